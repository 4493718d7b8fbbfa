"""Shared by all tests: Triton's interpreter on machines without a GPU, and the backends to test."""

import os

import hypothesis
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # no graph of an older version of the package

import head_cpu_cases  # noqa: E402
import row_cases  # noqa: E402
from rpo_kernels.head.cpu import plan as cpu_plan  # noqa: E402
from rpo_kernels.kernels import dispatch, native  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run: a GPU, or the CPU under the interpreter."""
    return DEVICE


@pytest.fixture
def available_backend():
    """A function from a backend's name to (name, device); skips with the reason where it is not available."""

    def find(name: str) -> tuple[str, str]:
        on = DEVICE if name == "triton" else "cpu"
        reason = dispatch.unavailable_reason(name, on, torch.float32)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        return name, on

    return find


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request, available_backend) -> str:
    """Each backend that is available here; the others are skipped with the reason.

    Triton's interpreter takes seconds a test: a module with INTERPRETED = False has tests of its own for it.
    """
    name, on = available_backend(request.param)
    if (name, on) == ("triton", "cpu") and not getattr(request.module, "INTERPRETED", True):
        pytest.skip("triton: interpreted, in a test of its own")
    return name


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks of 16 rows and tiles of 256 columns of the LM head, so that small inputs have several of both."""
    from rpo_kernels.head import plan

    monkeypatch.setattr(plan, "_SHAPES", {})
    monkeypatch.setattr(plan, "_ACCELERATOR_SHAPES", ((16, 256), (16, 256)))


@pytest.fixture(params=head_cpu_cases.SETS or [pytest.param("none", marks=pytest.mark.skip(reason="needs AVX-512"))])
def head_isa(request, monkeypatch) -> str:
    """The bfloat16 units, where the CPU has them, and their emulation, in force for the test."""
    monkeypatch.setenv(native.ISA_VARIABLE, request.param)
    return request.param


@pytest.fixture
def small_cpu_tiles(monkeypatch):
    """Chunks of 64 rows and tiles of 42 columns of the head on the CPU, so that small inputs have several of both."""
    monkeypatch.setattr(cpu_plan, "_SHAPES", ((64, 42),))


@pytest.fixture
def backend_device(backend) -> str:
    """Where tensors for `backend` live."""
    return DEVICE if backend == "triton" else "cpu"


@pytest.fixture
def rows(backend, backend_device, monkeypatch):
    """The backend's row kernels, with Triton's blocks so small that small rows have several and a partial one."""
    module = dispatch.rows(torch.empty(1, 1, 1, device=backend_device), backend)
    if backend == "triton":
        monkeypatch.setattr("rpo_kernels.kernels.triton.tiling.LANES", 32)
        if backend_device == "cpu":
            monkeypatch.setitem(row_cases.HALF_ULP, torch.bfloat16, 2**-7)  # the interpreter truncates to bfloat16
    return module
