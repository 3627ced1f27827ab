"""Command `audit`: prove from its files that a pruned checkpoint is what it claims."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.command import run_command
from permllm.assembly.audit import audit as audit_checkpoint


def audit(path: Path, source: Path | None = None) -> dict[str, Any]:
    """Prove that a masked, folded or packed checkpoint is whole, N:M in its order, and otherwise its source."""
    return asdict(audit_checkpoint(path, source))


def main(argv: list[str] | None = None) -> None:
    """Run the command."""
    arguments = {
        "path": {"type": Path, "help": "the checkpoint's folder"},
        "--source": {"type": Path, "help": "the dense checkpoint that it was pruned from"},
    }
    run_command("audit", audit, arguments, argv)


if __name__ == "__main__":
    main()
