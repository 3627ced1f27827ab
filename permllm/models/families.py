"""The table of model families: one row per architecture class. Nothing else names a family."""

from torch import nn

from permllm.lookup import lookup
from permllm.models.adapter import Attention, LinearGroup, ModelAdapter, Residual

ATTENTION = Attention("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", group="attention_out")

GATED_DECODER = ModelAdapter(
    decoder_layers="model.layers",
    linear_groups={
        "attention_in": LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="input_layernorm"),
        "attention_out": LinearGroup(("self_attn.o_proj",), writers=("self_attn.v_proj",)),
        "mlp_in": LinearGroup(("mlp.gate_proj", "mlp.up_proj"), norm="post_attention_layernorm"),
        "mlp_out": LinearGroup(("mlp.down_proj",), writers=("mlp.gate_proj", "mlp.up_proj")),
    },
    attention=ATTENTION,
    residual=Residual(
        columns=("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
        norms=("input_layernorm", "post_attention_layernorm"),
        writers=("self_attn.o_proj", "mlp.down_proj"),
    ),
    checkpoint_prefixes=("layers",),
)

OPT = ModelAdapter(
    decoder_layers="model.decoder.layers",
    linear_groups={
        "attention_in": LinearGroup(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), norm="self_attn_layer_norm"),
        "attention_out": LinearGroup(("self_attn.out_proj",), writers=("self_attn.v_proj",)),
        "mlp_in": LinearGroup(("fc1",), norm="final_layer_norm"),
        "mlp_out": LinearGroup(("fc2",), writers=("fc1",)),
    },
    attention=ATTENTION,
    residual=Residual(
        columns=(
            "model.decoder.embed_tokens.weight", "model.decoder.embed_positions.weight", "model.decoder.project_out.weight",
            "model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias", "lm_head.weight",
        ),
        rows=("model.decoder.project_in.weight",),
        replaces={"model.decoder.embed_tokens.weight": "model.decoder.project_in.weight", "lm_head.weight": "model.decoder.project_out.weight"},
        norms=("self_attn_layer_norm", "final_layer_norm"),
        writers=("self_attn.out_proj", "fc2"),
    ),
    checkpoint_prefixes=("decoder.layers",),
    norm_first="do_layer_norm_before",
)  # fmt: skip

FAMILIES = {
    "LlamaForCausalLM": GATED_DECODER,
    "MistralForCausalLM": GATED_DECODER,
    "Qwen2ForCausalLM": GATED_DECODER,
    "Qwen3ForCausalLM": GATED_DECODER,
    "OPTForCausalLM": OPT,
}


def adapter_for(architecture: str) -> ModelAdapter:
    """Return the adapter of an architecture, as `config.json` names it.

    Raises:
        ValueError: if it is not in the table; the message lists those that are.
    """
    return lookup(FAMILIES, architecture, "architecture")


def adapter_of(model: nn.Module) -> ModelAdapter:
    """Return the adapter of a loaded model, after proving that it covers every linear of the decoder layers.

    Raises:
        ValueError: if the class is not in the table, or the model has other linears than its family.
    """
    adapter = adapter_for(type(model).__name__)
    adapter.audit(model)
    return adapter
