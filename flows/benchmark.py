"""Stage `benchmark`: latency and memory of the model's linear shapes, dense against what this machine runs sparse."""

from collections import Counter
from typing import Any

import torch

from flows.paths import Setting
from flows.stage import run_stage
from permllm.artifacts import replacing_folder, versions, write_json
from permllm.benchmark.linears import measure_linears
from permllm.models.families import adapter_of
from permllm.models.loading import DTYPES, load_skeleton, resolve_device
from permllm.params import Params
from permllm.sparsity.pattern import NMPattern


def benchmark(params: Params, setting: Setting) -> dict[str, Any]:
    """Measure the latency and memory of a model's linear shapes."""
    model_params = params.model(setting.model)
    skeleton = load_skeleton(model_params.model_source())
    adapter = adapter_of(skeleton)
    shapes = Counter((linear.out_features, linear.in_features) for layer in adapter.layers(skeleton) for linear in adapter.linears(layer).values())
    device = resolve_device(model_params.device)
    rows = list(measure_linears(shapes, NMPattern.parse(setting.pattern), DTYPES[model_params.dtype], device, model_params.benchmark))
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "dtype": model_params.dtype,
    }
    with replacing_folder(setting.path("benchmark")) as folder:
        write_json(folder / "latency.json", {"machine": machine, "versions": versions(), "rows": rows})
    return {"rows": len(rows)}


def main(argv: list[str] | None = None) -> None:
    """Run the stage as a command."""
    run_stage("benchmark", benchmark, ("model", "pattern"), argv)


if __name__ == "__main__":
    main()
