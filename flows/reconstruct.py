"""Stage `reconstruct`: prune in learned orders, and give the kept weights new values where the method says so."""

from typing import Any

from flows.paths import Setting
from flows.prune import open_calibration, prune_layers
from flows.stage import run_stage
from permllm.artifacts import StaleArtifactError
from permllm.params import Params
from permllm.pruning.storage import load_orders


def reconstruct(params: Params, setting: Setting) -> dict[str, Any]:
    """Prune a model in the order that was learned for it, with new values for the kept weights if the method updates them."""
    learned, calibration = load_orders(setting.path("learn")), open_calibration(params, setting)
    if learned.manifest["calibration_fingerprint"] != calibration.fingerprint:
        raise StaleArtifactError(f"the orders in {learned.folder} were learned from another calibration; run the learn stage again")
    return prune_layers(params, setting, "reconstruct", calibration, learned)


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("reconstruct", reconstruct, ("model", "pattern", "method"), argv)


if __name__ == "__main__":
    main()
