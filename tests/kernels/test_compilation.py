import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_every_kernel_compiles_for_a_gpu_that_is_not_there(tmp_path, repository):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if not list(Path(triton.__file__).parent.glob("backends/nvidia/bin/ptxas*")):
        pytest.skip("this triton brings no assembler for NVIDIA GPUs")
    # A process of its own: where there is no GPU, this one defines kernels for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(repository), *sys.path[1:]])}
    command = [sys.executable, str(repository / "tests" / "kernels" / "compile_triton_kernels.py")]
    finished = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    lines = [line.split() for line in finished.stdout.splitlines()]
    assert len(lines) == 2 * (3 + 7)
    assert all(rounds_to_nearest == "True" for kernel, x, _, rounds_to_nearest, _ in lines if x == "*bf16" and kernel != "gather_kernel")
