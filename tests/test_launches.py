"""From logits to loss in three launches or fewer, backward in two more of which one reads B numbers."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from rpo_kernels import RPO, preference, rpo_loss

# Operators of torch that launch nothing on a GPU: allocation and views.
FREE = {
    *(
        "empty",
        "empty_strided",
        "as_strided",
        "_reshape_alias",
        "view",
        "expand",
        "detach",
        "alias",
        "reshape",
        "unsqueeze",
        "squeeze",
    ),
    *("slice", "select", "transpose", "t", "flatten", "narrow", "to"),
}


def make(device, vocab=512):
    logits = torch.randn(4, 6, vocab, device=device).requires_grad_()
    labels = torch.randint(vocab, (4, 6), device=device)
    return logits, labels, torch.randn(4, device=device), torch.randn(4, device=device)


@pytest.fixture
def launches(monkeypatch):
    """A function that counts the kernels a step launches: on a GPU, or from torch's operators and Triton's calls."""
    if torch.cuda.is_available():
        return _launches_on_gpu
    from triton.runtime import interpreter

    triton_calls = []
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda self, *_, **__: triton_calls.append(self))
    # What looks at values on the CPU only.
    monkeypatch.setattr("rpo_kernels.logprobs.checks_values", lambda *_: False)
    monkeypatch.setattr(preference, "_check_rewards", lambda *_: None)

    def count(step):
        triton_calls.clear()
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            step()
        leaves = [event.name for event in seen.events() if not event.cpu_children and event.name.startswith("aten::")]
        costly = [name for name in leaves if name.removeprefix("aten::").removeprefix("new_") not in FREE]
        return len(triton_calls) + len(costly)

    return count


def _launches_on_gpu(step):
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in seen.events())


@pytest.mark.parametrize("rows_fill_the_chip", [True, False])
def test_launches(available_backend, launches, monkeypatch, rows_fill_the_chip):
    backend, device = available_backend("triton")
    from rpo_kernels.kernels.triton import grad, stats

    for module in (stats, grad):
        monkeypatch.setattr(module, "processors", lambda _: 1 if rows_fill_the_chip else 1024)
    logits, labels, rewards, ref = make(device, 16384)

    def forward():
        return rpo_loss(logits, labels, rewards, ref_logps=ref, objective=RPO(), shift=True, backend=backend).loss

    def backward():
        torch.autograd.grad(loss, logits, one, retain_graph=True)

    loss, one = forward(), torch.ones((), device=device)
    assert launches(forward) == (2 if rows_fill_the_chip else 3)
    assert launches(backward) == 2
