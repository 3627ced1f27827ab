"""Stage `evaluate`: perplexity and zero-shot accuracy of an assembled checkpoint, or of the dense model."""

from dataclasses import replace
from typing import Any

from flows.paths import Setting
from flows.stage import run_stage
from permllm.evaluation import evaluate as library
from permllm.footprint import ModelSize, evaluate_needs
from permllm.memory import need_memory
from permllm.models.loading import load_model, load_tokenizer
from permllm.models.streaming import StreamedModel
from permllm.params import DENSE, Params


def evaluate(params: Params, setting: Setting) -> dict[str, Any]:
    """Evaluate an assembled checkpoint, or with --method dense the model as it came."""
    model_params = params.model(setting.model)
    source = model_params.model_source()
    tokenizer = load_tokenizer(source)
    if setting.method != DENSE:
        source = replace(source, source=str(setting.path("assemble")), revision=None)
    config, streamed = model_params.evaluate, StreamedModel.open(source)
    tokens = library.perplexity_tokens(config.perplexity, tokenizer)
    needs = evaluate_needs(ModelSize.of(streamed.files.shapes, streamed.adapter, streamed.dtype), config, tokens.numel(), model_params.hidden_states)
    need_memory(f"evaluate {setting.model}", streamed.device, *needs)
    measured = library.evaluate(streamed, lambda: load_model(source), tokenizer, tokens, config, model_params.keep_hidden())
    return {**measured, "bytes": streamed.files.total_bytes()}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("evaluate", evaluate, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
