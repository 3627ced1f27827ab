"""Kernels run twice: interpreted where there is no GPU, compiled where there is one."""

from types import ModuleType

import pytest
import torch


@pytest.fixture(params=["interpreted", pytest.param("compiled", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where `triton_kernels` runs: the CPU through Triton's interpreter, or a GPU."""
    pytest.importorskip("triton", reason="triton is not installed")
    has_gpu = torch.cuda.is_available()
    if request.param == "compiled" and not has_gpu:
        pytest.skip("needs a CUDA device")
    if request.param == "interpreted" and has_gpu:
        pytest.skip("interpreted only where there is no GPU to compile for")
    return torch.device("cuda" if has_gpu else "cpu")


@pytest.fixture
def triton_kernels(device: torch.device) -> ModuleType:
    """The module that needs triton."""
    from permllm.kernels import triton_kernels

    return triton_kernels
