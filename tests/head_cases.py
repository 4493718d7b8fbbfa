"""Inputs, float64 truth and comparisons shared by the tests of the LM head."""

import torch

import reference
from rpo_kernels import (
    linear_token_logprobs,
    memory_plan,
)
from rpo_kernels.head import gemm
from rpo_kernels.kernels import dispatch

OPS = torch.ops.rpo_kernels
VALUE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
OPTIONS = [
    dict(),
    dict(softcap=5.0),
    dict(shift=True, temperature=0.7, logit_scale=0.5),
    dict(shift=True, temperature=1.3, softcap=7.0, logit_scale=2.0, ignore_index=-1),
]


def make(shape=(3, 12), width=24, vocab=700, dtype=torch.float32, device="cpu", bias=False, seed=0, ignore_index=-100):
    """Leaves hidden, weight and bias (or None), and labels of which some repeat and some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator)
    weight = 0.8 * torch.randn(vocab, width, generator=generator)
    offset = torch.randn(vocab, generator=generator) if bias else None
    labels = torch.randint(vocab, shape, generator=generator)
    labels.view(-1)[::5] = vocab - 1
    labels[torch.rand(shape, generator=generator) < 0.3] = ignore_index
    tensors = [None if x is None else x.to(dtype).to(device).requires_grad_() for x in (hidden, weight, offset)]
    return *tensors, labels.to(device)


def expected(hidden, weight, bias, labels, factors, **options):
    """Float64 log-probabilities, and gradients of their sum with these factors."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    logps = reference.token_logprobs(logits, labels, **options)
    return logps.detach(), torch.autograd.grad((logps * factors).sum(), leaves)


def factors_for(labels):
    return torch.rand(labels.shape, generator=torch.Generator().manual_seed(9)).to(labels.device) - 0.3


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def compare(hidden, weight, bias, labels, backend, memory_budget=None, gradient_filter=None, **options):
    """Values and gradients against the reference."""
    factors = factors_for(labels)
    values, gradients = expected(hidden, weight, bias, labels, factors, **options)
    logps = linear_token_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        memory_budget=memory_budget,
        gradient_filter=gradient_filter,
        backend=backend,
        **options,
    )
    assert logps.shape == labels.shape and logps.dtype == torch.promote_types(hidden.dtype, torch.float32)
    torch.testing.assert_close(logps.double(), values, rtol=2e-6, atol=VALUE[hidden.dtype])
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    got = torch.autograd.grad((logps * factors).sum(), leaves)
    # Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds.
    cut = 2 if backend == "triton" and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 else 1
    for leaf, mine, exact in zip(leaves, got, gradients):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        assert error(mine, exact) <= cut * GRADIENT[leaf.dtype]


def plan_keeping(share, rows, hidden, weight, backend, **needs):
    """A budget that keeps none, some or all tiles of the weight's gradient, and its plan."""
    tile = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    for budget in range(0, 10**7, 2000):
        chosen = memory_plan(
            rows,
            weight.shape[1],
            weight.shape[0],
            weight.dtype,
            positions=hidden.shape[:-1].numel(),
            memory_budget=budget,
            device=weight.device,
            backend=dispatch.choose(tile, backend),
            **needs,
        )
        kept = "none" if chosen.kept_tiles == 0 else "all" if chosen.kept_tiles == chosen.tiles else "some"
        if kept == share:
            return budget, chosen
    raise AssertionError(f"no budget keeps {share} of the tiles")


def sparse(device, dtype=torch.float32, vocab=1500):
    """A head whose softmax lies on a few columns, as a trained model's."""
    hidden, weight, bias, labels = make((4, 12), vocab=vocab, dtype=dtype, device=device, bias=True)
    with torch.no_grad():
        weight *= 0.3
        bias -= 12
        bias[::40] += 14
    return hidden, weight, bias, labels


def count_products(monkeypatch):
    """A list to which each product adds its multiplications."""
    done = []
    for name, first in (("matmul", 0), ("add_matmul", 1)):

        def counted(*args, original=getattr(gemm, name), first=first):
            left, right = args[first : first + 2]
            done.append(left.shape[0] * left.shape[1] * right.shape[1])
            original(*args)

        monkeypatch.setattr(gemm, name, counted)
    return done
