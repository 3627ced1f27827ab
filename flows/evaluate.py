"""Stage `evaluate`: perplexity and zero-shot accuracy of an assembled checkpoint, or of the dense model."""

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from flows.paths import Setting
from flows.stage import Progress, run_stage
from permllm.artifacts import source_fingerprint
from permllm.assembly.checkpoint import check_checkpoint
from permllm.evaluation import evaluate as library
from permllm.footprint import ModelSize, evaluate_needs
from permllm.memory import need_memory
from permllm.models.loading import SMALL_FILES, load_model, load_tokenizer
from permllm.models.streaming import StreamedModel
from permllm.params import DENSE, Params
from permllm.scratch import Scratch


def evaluate(params: Params, setting: Setting) -> dict[str, Any]:
    """Evaluate an assembled checkpoint, or with --method dense the model as it came."""
    model_params = params.model(setting.model)
    source = model_params.model_source()
    tokenizer, folder = load_tokenizer(source), source.folder()
    if setting.method != DENSE:
        source = replace(source, source=str(setting.path("assemble")), revision=None)
        check_checkpoint(setting.path("assemble"))
    config, streamed = model_params.evaluate, StreamedModel.open(source)
    tokens = library.perplexity_tokens(config.perplexity, tokenizer)
    needs = evaluate_needs(ModelSize.of(streamed.files.shapes, streamed.adapter, streamed.dtype), config, tokens.numel(), model_params.hidden_states)
    need_memory(f"evaluate {setting.model}", streamed.device, *needs)
    questions = {name: found and list(map(asdict, found)) for name, found in config.zero_shot.questions().items()}
    parts = [source_fingerprint("calibration", "evaluation", "models"), version("lm-eval"), streamed.files.fingerprint(), tokens, questions]
    parts += [asdict(config), source.dtype, str(streamed.device), *(path for kind in SMALL_FILES for path in sorted(folder.glob(kind)))]
    scratch, names = Scratch.open(setting.scratch("evaluate"), parts), config.parts()
    with Progress("evaluate task", len(names), sum(map(scratch.has, names))) as steps:

        def once(name: str, measure: Callable[[], Any]) -> Any:
            is_new = not scratch.has(name)
            result = scratch.once(name, measure)
            if is_new:
                steps.step(name)
            return result

        measured = library.evaluate(streamed, lambda: load_model(source), tokenizer, tokens, config, model_params.keep_hidden(), once)
    return {**measured, "bytes": streamed.files.total_bytes()}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("evaluate", evaluate, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
