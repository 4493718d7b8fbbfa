"""Shared by all tests: Triton's interpreter on machines without a GPU, and the backends to test."""

import os

import hypothesis
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # no graph of an older version of the package

from rpo_kernels.kernels import dispatch  # noqa: E402

hypothesis.settings.register_profile("untimed", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("untimed")


@pytest.fixture
def device() -> str:
    """Where the Triton kernels run: a GPU, or the CPU under the interpreter."""
    return DEVICE


@pytest.fixture
def live_backend():
    """A function from a backend's name to (name, device); skips with the reason where it is not live."""

    def find(name: str) -> tuple[str, str]:
        on = DEVICE if name == "triton" else "cpu"
        reason = dispatch.unavailable_reason(name, on, torch.float32)
        if reason is not None:
            pytest.skip(f"{name}: {reason}")
        return name, on

    return find


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request, live_backend) -> str:
    """Each backend that is live here; the others are skipped with the reason."""
    return live_backend(request.param)[0]


@pytest.fixture
def backend_device(backend) -> str:
    """Where tensors for `backend` live."""
    return DEVICE if backend == "triton" else "cpu"
