"""A model streamed from its checkpoint gives, bit for bit, what the whole model gives. Sequences exceed Mistral's window."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm.calibration.capture import HIDDEN_STATES, all_logits, dense_statistics
from permllm.evaluation.perplexity import perplexity
from permllm.models.loading import DTYPES, ModelSource, load_model
from permllm.models.streaming import LoadedModel, StreamedModel
from permllm.pruning.layerwise import prune_in_sequence
from permllm.pruning.methods import PruningMethod
from permllm.sparsity.pattern import NMPattern

LENGTH = 24


@pytest.fixture
def source(tiny_checkpoint, tmp_path, family):
    return ModelSource(str(tiny_checkpoint(tmp_path, family, max_shard_size="20KB")), device="cpu")


def assert_equal_statistics(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name].gram, other[name].gram) for name in other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_part_has_the_weights_of_the_loaded_model_while_it_is_there(source, dtype):
    source = replace(source, dtype=dtype)
    streamed, expected = StreamedModel.open(source), load_model(source).state_dict()
    parts = [(streamed.stem, 0), *((lambda index=index: streamed.layer(index), 1) for index in range(len(streamed))), (streamed.head, 0)]
    seen = set()
    for part, _ in parts:
        with part():
            present = {name: tensor for name, tensor in streamed.model.state_dict().items() if not tensor.is_meta}
            assert present and all(torch.equal(tensor, expected[name]) and tensor.dtype == DTYPES[dtype] for name, tensor in present.items())
            seen |= set(present)
        assert all(parameter.is_meta for parameter in streamed.model.parameters())
    assert seen == set(expected)


def test_one_decoder_layer_is_there_at_a_time_and_without_what_surrounds_it(source):
    streamed = StreamedModel.open(source)
    with streamed.layer(1) as layer:
        present = [name for name, parameter in streamed.model.named_parameters() if not parameter.is_meta]
        assert len(present) == len(list(layer.parameters())) and all(name.startswith(streamed.adapter.layer_path(1)) for name in present)


def test_buffers_that_no_checkpoint_holds_are_computed(source):
    streamed, loaded = StreamedModel.open(source), load_model(source)
    assert all(torch.equal(buffer, dict(streamed.model.named_buffers())[name]) for name, buffer in loaded.named_buffers())


@pytest.mark.parametrize("kept", ["memory", "disk", "device"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_statistics_are_those_of_the_whole_model(source, draw_tokens, batch_size, kept, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens, whole = draw_tokens(5, LENGTH), LoadedModel.of(load_model(source))
    found = dense_statistics(StreamedModel.open(source), tokens, batch_size, HIDDEN_STATES[kept])
    assert_equal_statistics(found, dense_statistics(whole, tokens, batch_size))
    assert not list(tmp_path.glob(".cache/hidden/*"))


def test_statistics_of_later_layers_alone_are_those_of_the_full_run(source, draw_tokens):
    tokens, streamed = draw_tokens(3, LENGTH), StreamedModel.open(source)
    assert_equal_statistics(dense_statistics(streamed, tokens, 2, first=2), list(dense_statistics(streamed, tokens, 2))[2:])


@pytest.mark.parametrize("method", [PruningMethod("wanda"), PruningMethod(permutation="cp", update="sparsegpt")], ids=str)
def test_pruning_in_sequence_is_that_of_the_whole_model(source, draw_tokens, method):
    tokens = draw_tokens(4, LENGTH)
    whole, streamed = (
        prune_in_sequence(model, tokens, 2, NMPattern(2, 4), method) for model in (LoadedModel.of(load_model(source)), StreamedModel.open(source))
    )
    for expected, found in zip(whole, streamed, strict=True):
        for name, group in expected.items():
            assert group.permutation == found[name].permutation and group.output_error == found[name].output_error
            for path, linear in group.linears.items():
                assert torch.equal(linear.mask, found[name].linears[path].mask)
                assert linear.weight is None or torch.equal(linear.weight, found[name].linears[path].weight)


def test_perplexity_is_that_of_the_whole_model_and_of_its_own_forward(source, draw_tokens):
    tokens, model = draw_tokens(1, 120)[0], load_model(source)
    streamed = perplexity(StreamedModel.open(source), tokens, LENGTH, 2)
    assert streamed == perplexity(LoadedModel.of(model), tokens, LENGTH, 2)
    windows = tokens.view(-1, LENGTH)
    logits = torch.log_softmax(model(windows).logits[:, :-1], -1).gather(-1, windows[:, 1:, None])
    assert streamed == pytest.approx(float((-logits.double().mean()).exp()), rel=1e-5)


def test_tied_embeddings_are_read_once_and_serve_as_head(tiny_model, draw_tokens, tmp_path):
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    source = ModelSource(str(tmp_path), device="cpu")
    streamed, loaded = StreamedModel.open(source), load_model(source)
    assert "lm_head.weight" not in streamed.stored
    tokens = draw_tokens(2, LENGTH)
    assert torch.equal(all_logits(streamed, tokens), loaded(tokens).logits)


def test_an_own_head_under_a_configuration_that_ties_is_kept_as_transformers_does(tiny_model, draw_tokens, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    source, tokens = ModelSource(str(tmp_path), device="cpu"), draw_tokens(2, LENGTH)
    assert torch.equal(all_logits(StreamedModel.open(source), tokens), load_model(source)(tokens).logits)


def test_an_error_in_a_layer_leaves_no_weights_behind(source):
    streamed = StreamedModel.open(source)
    with pytest.raises(RuntimeError), streamed.layer(0):
        raise RuntimeError
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_all_that_is_wrong_with_the_tensors_is_named_before_the_run(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"], tensors["model.norm.weight"]
    tensors |= {"model.layers.0.mlp.up_proj.weight": torch.zeros(7, 32), "extra": torch.zeros(1)}
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError) as refused:
        StreamedModel.open(ModelSource(str(folder), device="cpu"))
    for problem in (
        "model.layers.1.mlp.down_proj.weight is missing",
        "model.norm.weight is missing",
        "model.layers.0.mlp.up_proj.weight has shape (7, 32), not (48, 32)",
        "extra has no place in the model",
        "fills model.embed_tokens.weight, as another tensor does",
    ):
        assert problem in str(refused.value)


def test_weights_that_are_not_finite_are_all_named_before_the_run(tiny_checkpoint, tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama")
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.2.mlp.down_proj.weight", "lm_head.weight"):
        tensors[name].view(-1)[3] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinity in .*(layers.2.mlp.down_proj.*lm_head|lm_head.*layers.2.mlp.down_proj)"):
        StreamedModel.open(ModelSource(str(folder), device="cpu"))
