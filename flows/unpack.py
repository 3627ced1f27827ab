"""Command `unpack`: write the checkpoint that was packed, bit for bit."""

from pathlib import Path
from typing import Any

from flows.command import run_command
from permllm.assembly.packed import unpack as unpack_checkpoint


def unpack(packed: Path, folder: Path) -> dict[str, Any]:
    """Write the checkpoint that was packed, bit for bit, in stock format."""
    return unpack_checkpoint(packed, folder)


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = {
        "packed": {"type": Path, "help": "what `permllm pack` wrote"},
        "folder": {"type": Path, "help": "where to write; new or empty"},
    }
    run_command("unpack", unpack, arguments, argv)


if __name__ == "__main__":
    main()
