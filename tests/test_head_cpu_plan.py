"""What the plan of the walk on CPUs with bfloat16 units says, against what is allocated."""

import pytest
import torch

from head_cpu_cases import make
from rpo_kernels import linear_token_logprobs, memory_plan
from rpo_kernels.kernels import native_head
from test_plan import peak_of

pytestmark = pytest.mark.skipif(native_head.reason() is not None, reason="needs bfloat16 units")
STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")


@pytest.mark.parametrize("budget", [0, "30MB"])
@pytest.mark.parametrize(
    "asked",
    [
        dict(outputs=STATISTICS, entropy_grad=False),
        dict(outputs=STATISTICS, entropy_grad=True),
        dict(gradient_filter=2.0**-30),  # leaves every column in
        dict(gradient_filter=2.0**-30, outputs=STATISTICS, entropy_grad=True),
    ],
    ids=["outputs", "entropy", "filter", "filter and entropy"],
)
@pytest.mark.parametrize("rows", [600, 1500], ids=["one chunk", "several chunks"])
def test_the_plan_counts_what_is_allocated(rows, asked, budget):
    hidden, weight, labels, _ = make(rows, 128, 16384, spread=1.0)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    planned = memory_plan(rows, 128, 16384, memory_budget=budget, **asked)

    def forward():
        found = linear_token_logprobs(*leaves, labels, memory_budget=budget, **asked)
        return found if isinstance(found, tuple) else (found,)

    found, in_forward, held = peak_of(forward)
    loss = found[0].sum() + (found[1].sum() if asked.get("entropy_grad") else 0)
    _, in_backward, _ = peak_of(lambda: torch.autograd.grad(loss, leaves))
    results = sum(x.nbytes for x in found if x is not None)
    early = weight.nbytes if planned.shared.tiles else 0  # forward allocates the weight's gradient
    measured = max(in_forward - early, held + in_backward - planned.gradient_bytes) - results
    assert measured <= planned.peak_bytes <= 1.1 * measured
