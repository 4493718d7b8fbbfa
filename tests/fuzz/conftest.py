"""Fuzzing: a small fixed budget, or RPO_FUZZ_EXAMPLES of each test; memory that torch hands out holds NaN."""

import os

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck

hypothesis.settings.register_profile(
    "fuzz",
    deadline=None,
    max_examples=int(os.environ.get("RPO_FUZZ_EXAMPLES", "12")),
    derandomize="RPO_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def memory_filled_with_nan():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
