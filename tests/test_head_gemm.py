"""Half-precision products with float32 results and float32 sums: found out, said, and torch's flags left as found."""

import threading

import pytest
import torch

from head_cases import make
from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import gemm
from rpo_kernels.head.tiles import Head
from rpo_kernels.kernels.interface import TokenOptions

NAMES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


def flags():
    of_torch = torch.backends.cuda.matmul
    splits = [getattr(of_torch, name + "_split_k") for name in NAMES[:2]]
    return [getattr(of_torch, name) for name in NAMES], splits


@pytest.fixture(params=[(True, True, True), (False, False, False), (False, True, True)], ids=str)
def given(request):
    """Torch's flags as a user set them: reductions in half precision, split sums, fp16 accumulation."""
    before = flags()
    reduces, splits, accumulates = request.param
    of_torch = torch.backends.cuda.matmul
    for name in NAMES[:2]:
        setattr(of_torch, name, (reduces, splits))
    of_torch.allow_fp16_accumulation = accumulates
    yield flags()
    for name, value, split in zip(NAMES[:2], before[0], before[1]):
        setattr(of_torch, name, (value, split))
    of_torch.allow_fp16_accumulation = before[0][2]


def test_flags_are_off_within_and_as_found_after(given):
    off = ([False] * 3, given[1])
    with pytest.raises(KeyError), gemm.whole_sums("cuda", torch.bfloat16):
        assert flags() == off
        with gemm.whole_sums("cuda", torch.float16):
            assert flags() == off
        assert flags() == off
        raise KeyError
    assert flags() == given
    for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.float32)):
        with gemm.whole_sums(device, dtype):
            assert flags() == given


def test_flags_stay_off_until_the_last_thread_has_left(given):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with gemm.whole_sums("cuda", torch.bfloat16):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with gemm.whole_sums("cuda", torch.bfloat16):
        thread.start()
        assert inside.wait(10)
    assert flags()[0] == [False] * 3
    leave.set()
    thread.join()
    assert flags() == given


def test_both_passes_of_the_head_multiply_so(given, monkeypatch):
    monkeypatch.setattr(gemm, "_has_flags", lambda device_type: True)
    seen = []
    multiply = gemm.matmul
    monkeypatch.setattr(gemm, "matmul", lambda *args: seen.append(flags()[0]) or multiply(*args))
    hidden, weight, _, labels = make(dtype=torch.bfloat16)
    logps = linear_token_logprobs(hidden, weight, labels, backend="torch")
    forward = len(seen)
    torch.autograd.grad(logps.sum(), (hidden, weight))
    assert 0 < forward < len(seen) and not any(map(any, seen))
    assert flags() == given


@pytest.mark.parametrize("rounds", [True, False])
def test_float32_results_are_looked_at(monkeypatch, rounds):
    """A product that takes `out_dtype` and yet rounds to half precision is found out."""

    def product(left, right, out_dtype=None, out=None):
        exact = left.float() @ right.float()
        return out.copy_(exact.to(left.dtype) if rounds else exact)

    def added(total, left, right, out_dtype=None, out=None):
        return out.copy_(total + product(left, right, out=torch.empty_like(total)))

    gemm.results_in_float32.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(torch, "mm", product)
        patched.setattr(torch, "addmm", added)
        for dtype in (torch.bfloat16, torch.float16):
            assert gemm.results_in_float32("cpu", dtype) is not rounds
        words = gemm.describe("cpu")
    gemm.results_in_float32.cache_clear()
    assert ("rounded" in words) == rounds


def test_rounded_logits_are_announced(monkeypatch):
    monkeypatch.setattr("rpo_kernels.head.tiles.operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(gemm, "results_in_float32", lambda *_: False)
    with pytest.warns(UserWarning, match="float32 result.*logits are rounded"):
        half = torch.zeros(2, 2, dtype=torch.bfloat16)
        assert Head(half, half, None, TokenOptions(), None).logits_dtype == torch.bfloat16
