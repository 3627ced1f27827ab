"""Stage `assemble`: write the pruned model as a stock checkpoint, with its permutations and masks beside it.

Under the layout `foldable` its orders are folded away: the checkpoint is N:M as it lies.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flows.paths import Setting
from flows.stage import run_stage
from permllm.artifacts import replacing_folder
from permllm.assembly.checkpoint import write_masked_checkpoint
from permllm.assembly.folded import write_folded_checkpoint
from permllm.footprint import ModelSize, assemble_needs
from permllm.memory import need_memory
from permllm.models.checkpoint_files import CheckpointFiles
from permllm.models.loading import load_adapter
from permllm.params import Params
from permllm.pruning.storage import load_pruning


def assemble(params: Params, setting: Setting) -> dict[str, Any]:
    """Write a pruned model as a stock checkpoint."""
    source = params.model(setting.model).model_source()
    pruning = load_pruning(setting.path("prune"))
    adapter, shapes = load_adapter(source), CheckpointFiles.find(source.folder()).shapes
    needs = assemble_needs(ModelSize.of(shapes, adapter, torch.float32), pruning.manifest["method_settings"]["update"])
    need_memory(f"assemble {setting.model}", torch.device("cpu"), *needs)
    with replacing_folder(setting.path("assemble")) as folder:
        if pruning.manifest["method_settings"]["layout"] == "free":
            return write_masked_checkpoint(source.folder(), adapter, pruning, folder)
        with TemporaryDirectory(dir=setting.scratch("assemble")) as masked:
            written = write_masked_checkpoint(source.folder(), adapter, pruning, Path(masked))
            return {**written, **write_folded_checkpoint(Path(masked), folder)}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("assemble", assemble, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
