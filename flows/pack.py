"""Command `pack`: write a pruned checkpoint without its zeros."""

from pathlib import Path
from typing import Any

from flows.command import run_command
from permllm.assembly.packed import write_packed
from permllm.sparsity.pattern import NMPattern


def pack(checkpoint: Path, folder: Path, pattern: str | None = None) -> dict[str, Any]:
    """Write a pruned checkpoint without its zeros, for `permllm.load`."""
    return write_packed(checkpoint, folder, NMPattern.parse(pattern) if pattern else None)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = {
        "checkpoint": {"type": Path, "help": "what `permllm assemble` wrote"},
        "folder": {"type": Path, "help": "where to write; new or empty"},
        "--pattern": {"help": "N:M, of a checkpoint without record that is N:M as it lies"},
    }
    run_command("pack", pack, arguments, argv)


if __name__ == "__main__":
    main()
