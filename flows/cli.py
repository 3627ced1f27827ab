"""The `permllm` command: a subcommand per stage, nothing else."""

import argparse
import importlib

STAGES = ("calibrate", "prune", "learn", "assemble", "benchmark", "evaluate", "report", "ablation")


def main() -> None:
    """Run `permllm STAGE ...`, which is `python -m flows.STAGE ...`."""
    parser = argparse.ArgumentParser(prog="permllm", description="One stage of the pipeline, with the settings of ./params.yaml.")
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="see `permllm STAGE --help`")
    chosen = parser.parse_args()
    importlib.import_module(f"flows.{chosen.stage}").main(chosen.arguments)
