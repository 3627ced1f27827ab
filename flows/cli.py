"""The `permllm` command: a subcommand per stage, and those on checkpoint folders; nothing else."""

import argparse
import importlib

STAGES = ("calibrate", "prune", "learn", "reconstruct", "assemble", "benchmark", "evaluate", "report", "ablation", "objectives")
COMMANDS = ("pack", "unpack", "audit", "kernels")


def main() -> None:
    """Run `permllm COMMAND ...`, which is `python -m flows.COMMAND ...`."""
    parser = argparse.ArgumentParser(
        prog="permllm",
        description="One stage of the pipeline, with the settings of ./params.yaml; or pack, unpack or audit a checkpoint; or measure kernels.",
    )
    parser.add_argument("command", choices=(*STAGES, *COMMANDS))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `permllm COMMAND --help`")
    chosen = parser.parse_args()
    importlib.import_module(f"flows.{chosen.command}").main(chosen.arguments)
