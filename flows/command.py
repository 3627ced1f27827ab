"""What the commands on checkpoint folders share: paths as arguments, a result on standard output, errors in one line."""

import argparse
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

from permllm.assembly.checkpoint import VerificationError


def run_command(name: str, command: Callable[..., dict[str, Any]], arguments: dict[str, dict[str, Any]], argv: list[str] | None = None) -> None:
    """Run a command and print its result as JSON, or exit with `permllm NAME: what is wrong`.

    Args:
        arguments: of argparse, by name; the command takes them by keyword.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    parser = argparse.ArgumentParser(prog=f"permllm {name}", description=command.__doc__)
    for argument, options in arguments.items():
        parser.add_argument(argument, **options)
    try:
        result = command(**vars(parser.parse_args(argv)))
    except (ValueError, ArithmeticError, OSError, VerificationError) as error:  # what the user can mend, or should hear of in a line
        sys.exit(f"permllm {name}: {error}")
    print(json.dumps(result, indent=2))
