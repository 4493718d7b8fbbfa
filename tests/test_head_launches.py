"""Kernels launched and waits for the device at the head level, counted: what each tile, chunk and call adds."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import evaluation_plan, plan
from test_launches import FREE

WAITS = {"aten::nonzero", "aten::_local_scalar_dense"}  # on a GPU the host waits in these


# Besides, what is a view, a memory's allocation or a question.
VIEWS = {*FREE, "resolve_conj", "resolve_neg", "empty_strided", "unbind", "promote_types", "as_strided_", "lift_fresh"}
VIEWS |= {"detach_", "empty_like", "result_type", "resize_", "set_", "can_cast", "permute", "numpy_T"}


def launches_of(event):
    """Kernels of an operator: those of the operators within it, or its own one."""
    within = sum(launches_of(child) for child in event.cpu_children)
    name = event.name.removeprefix("aten::").removeprefix("new_")
    return within or int(event.name.startswith("aten::") and name not in VIEWS)


@pytest.fixture
def counts(live_backend, monkeypatch):
    """A function of the numbers of tiles and chunks: launches and waits of a forward and of its backward."""
    backend, device = live_backend("triton")
    if device != "cpu":
        pytest.skip("counted from torch's operators and Triton's calls under the interpreter")
    from triton.runtime import interpreter

    calls: list[object] = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: calls.append(self))
    monkeypatch.setattr("rpo_kernels.head.operator.check_label_range", lambda *_: None)
    monkeypatch.setattr(plan, "_SHAPES", {})
    monkeypatch.setattr(plan, "_ACCELERATOR_SHAPES", ((16, 256), (16, 256)))

    def measure(work):
        calls.clear()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            result = work()
        launched = sum(launches_of(event) for event in seen.events() if event.cpu_parent is None)
        waits = sum(event.name in WAITS for event in seen.events())
        return result, len(calls) + launched, waits

    def count(tiles, chunks, **options):
        hidden = torch.randn(16 * chunks, 8).requires_grad_(options.pop("hidden", True))
        weight = torch.randn(256 * tiles, 8).requires_grad_(options.pop("weight", True))
        labels = torch.zeros(16 * chunks, dtype=torch.int64)
        logps, forward, waits = measure(
            lambda: linear_token_logprobs(
                hidden, weight, labels, backend=backend, **{"memory_budget": "1GB", **options}
            )
        )
        leaves = [x for x in (hidden, weight) if x.requires_grad]
        if not leaves:
            return forward, 0, waits, 0
        _, backward, again = measure(lambda: torch.autograd.grad(logps, leaves, torch.ones_like(logps)))
        return forward, backward, waits, again

    return count


@pytest.mark.parametrize(
    "options, forward, backward",
    [
        (dict(), 3, 2),  # logits, P, P W; hidden states scaled, the weight's gradient
        (dict(weight=False), 3, 0),
        (dict(hidden=False, weight=False), 2, 0),  # logits, statistics
    ],
    ids=["trained", "frozen", "evaluated"],
)
def test_launches_a_tile(counts, options, forward, backward):
    few, many = counts(3, 1, **options), counts(7, 1, **options)
    assert (many[0] - few[0]) / 4 == forward
    assert (many[1] - few[1]) / 4 == backward


def test_launches_without_gradients_on_a_narrow_head(counts, monkeypatch):
    """Rows gathered, the product, the merging of its blocks: three a chunk, whatever the vocabulary."""
    monkeypatch.setattr(evaluation_plan, "pays", lambda *_: True)
    monkeypatch.setattr(evaluation_plan, "CHUNK_ROWS", 16)
    few, more, many = (counts(*size, hidden=False, weight=False)[0] for size in ((3, 1), (7, 1), (3, 5)))
    assert few == more
    assert (many - few) / 4 == 3


def test_host_waits_once_a_forward_and_never_in_backward(counts):
    for tiles, chunks in ((3, 1), (5, 2)):
        assert counts(tiles, chunks)[2:] == (1, 0)
        # A filter's backward waits for its columns, and for where each tile's begin.
        assert counts(tiles, chunks, gradient_filter=2.0**-10)[2] == 1


def test_launches_a_call(counts):
    """Beyond tiles: what an empty walk would still cost. Printed by `pytest -s`."""
    few, many = counts(3, 1), counts(7, 1)
    fixed = [few[i] - 3 * (many[i] - few[i]) / 4 for i in (0, 1)]
    print(f"launches a call beyond its tiles: forward {fixed[0]:.0f}, backward {fixed[1]:.0f}")
    assert fixed[0] <= 32 and fixed[1] <= 12
