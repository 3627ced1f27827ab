"""Stage `assemble`: write the pruned model as a stock checkpoint, with its permutations and masks beside it."""

from typing import Any

from flows.paths import Setting
from flows.stage import run_stage
from permllm.artifacts import replacing_folder
from permllm.assembly.checkpoint import write_masked_checkpoint
from permllm.models.loading import load_adapter
from permllm.params import Params
from permllm.pruning.storage import load_pruning


def assemble(params: Params, setting: Setting) -> dict[str, Any]:
    """Write a pruned model as a stock checkpoint."""
    source = params.model(setting.model).model_source()
    pruning = load_pruning(setting.path("prune"))
    adapter = load_adapter(source)
    with replacing_folder(setting.path("assemble")) as folder:
        return write_masked_checkpoint(source.folder(), adapter, pruning, folder)


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("assemble", assemble, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
