"""torch's own checks: gradcheck of each public operator in float64, opcheck of the head's kinds of arguments."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from head_cases import OPS
from rpo_kernels import (
    DPO,
    RPO,
    SimPO,
    linear_rpo_loss,
    linear_token_logprobs,
    preference_loss,
    rpo_loss,
    score_loss,
    token_logprobs,
)
from rpo_kernels.kernels.interface import TokenOptions

VOCAB, WIDTH = 11, 3
OUTPUTS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
LABELS = torch.tensor([[3, -100, 10, 0], [7, 1, 1, -100], [5, 5, -100, 2], [0, 9, 4, 6]])
REWARDS = torch.tensor([0.3, -1.0, 2.0, 0.5])
ROWS = torch.tensor([0, 0, 3, 2])
WEIGHTS = 0.5 + torch.arange(16.0).reshape(4, 4) / 16
PACKED = dict(cu_seqlens=torch.tensor([0, 3, 8, 9, 16]))
OPTIONS = dict(softcap=4.0, temperature=0.8, logit_scale=1.3)


def random(*shape):
    return torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))
    ).requires_grad_()


def of_logits(**options):
    return lambda x: token_logprobs(x, LABELS, **options)


def of_head(**options):
    return lambda h, w, b: linear_token_logprobs(h, w, LABELS, bias=b, **options)


def loss_of_logits(labels=LABELS, shape=(4, 4), **options):
    return lambda x: rpo_loss(
        x.reshape(*shape, VOCAB), labels.reshape(shape), REWARDS, ref_logps=REF, shift=True, **options
    )[:2]


def loss_of_head(**options):
    return lambda h, w: linear_rpo_loss(h, w, LABELS, REWARDS, shift=True, **options)[:2]


REF = -torch.arange(4.0)
LOGITS, HEAD = (random(4, 4, VOCAB),), (random(4, 4, WIDTH), random(VOCAB, WIDTH), random(VOCAB))
CASES = {
    "token_logprobs": (of_logits(**OPTIONS), LOGITS),
    "token_logprobs shift": (of_logits(shift=True, outputs=("entropy",), temperature=0.5), LOGITS),
    "token_logprobs rows": (lambda x: token_logprobs(x, LABELS[0], rows=ROWS), (random(4, VOCAB),)),
    "linear_token_logprobs": (of_head(**OPTIONS), HEAD),
    "linear_token_logprobs kept": (of_head(shift=True, memory_budget="1GB"), HEAD),
    "linear_token_logprobs recomputed": (of_head(memory_budget=0), HEAD),
    "linear_token_logprobs filter": (of_head(gradient_filter=0.0, **OPTIONS), HEAD),
    "linear_token_logprobs entropy": (of_head(outputs=("entropy",)), HEAD),
    "linear_token_logprobs rows": (
        lambda h, w: linear_token_logprobs(h, w, LABELS[0], rows=ROWS),
        (random(4, WIDTH), random(VOCAB, WIDTH)),
    ),
    "rpo_loss": (loss_of_logits(token_weights=WEIGHTS), LOGITS),
    "rpo_loss packed": (loss_of_logits(shape=(16,), objective=RPO("fwd_kl"), **PACKED), LOGITS),
    "rpo_loss ragged": (loss_of_logits(objective=RPO("sq"), group_ids=[1, 2, 2, 2]), LOGITS),
    "linear_rpo_loss": (loss_of_head(ref_hidden=HEAD[0].detach() * 0.5, ref_weight=HEAD[1].detach().clone()), HEAD[:2]),
    "linear_rpo_loss free": (loss_of_head(objective=SimPO(), num_responses=4), HEAD[:2]),
    "preference_loss": (
        lambda logps: preference_loss(logps, LABELS, REWARDS, ref_logps=REF, layout="stacked")[:2],
        (random(4, 4),),
    ),
    "score_loss": (lambda s: score_loss(s, REWARDS, objective=DPO(beta=1.0))[:2], (random(4),)),
    "score_loss one-hot": (
        lambda s: score_loss(s, REWARDS, objective=RPO(target_margin=math.inf), num_responses=4)[:2],
        (random(4),),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case):
    function, inputs = CASES[case]

    def differentiable(*inputs):
        results = function(*inputs)
        if isinstance(results, torch.Tensor):
            return results
        return tuple(x for x in results if x is not None and x.requires_grad)

    assert gradcheck(differentiable, inputs, fast_mode=True)


KINDS = {
    "int32 labels": lambda h, w, b, y: (h, w, b, y.int()),
    "no bias": lambda h, w, b, y: (h, w, None, y),
    "transposed weight": lambda h, w, b, y: (h, w.t().contiguous().t(), b, y),
    "part of wider rows": lambda h, w, b, y: (torch.cat((h, h), -1)[:, :WIDTH], torch.cat((w, w), -1)[:, :WIDTH], b, y),
    "nothing scored": lambda h, w, b, y: (h, w, b, torch.full_like(y, -100)),
    "no rows": lambda h, w, b, y: (h[:0], w, b, y[:, :0]),
    "bfloat16": lambda h, w, b, y: (h.bfloat16(), w.bfloat16(), b.bfloat16(), y),
    "float64": lambda h, w, b, y: (h.double(), w.double(), b.double(), y),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["native", "torch"])
def test_opcheck_of_the_heads_kinds_of_arguments(name, kind, available_backend):
    backend, _ = available_backend(name)
    if name == "native" and kind == "float64":
        backend = None
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(*shape, generator=generator) for shape in ((16, WIDTH), (VOCAB, WIDTH), (VOCAB,))]
    *tensors, labels = KINDS[kind](*tensors, LABELS.view(1, -1))
    options = {**TokenOptions(softcap=5.0)._asdict(), "gradient_filter": None, "outputs": [], "entropy_grad": True}
    needs = dict(needs_hidden=True, needs_weight=True)
    forward = {**options, **needs, "memory_budget": 10**6, "inplace_backward": True, "backend": backend}
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    torch.library.opcheck(OPS.linear_token_logprobs, (*leaves, labels), forward, test_utils=checks)
    logps, _, _, _, *saved = OPS.linear_token_logprobs(*tensors, labels, **forward)
    inputs = (*tensors, labels, torch.ones_like(logps), None, saved)
    backward = {**options, **needs, "needs_bias": tensors[2] is not None, "backend": backend}
    torch.library.opcheck(OPS.linear_token_logprobs_grad, inputs, backward, test_utils=checks)


def head_calls(device):
    """Functions of the hidden states and the weight, with the shapes of their results."""
    labels, rewards = torch.zeros(4, 6, dtype=torch.int64, device=device), torch.empty(4, device=device)
    ref = dict(ref_logps=torch.empty(4, device=device))
    offsets = torch.zeros(5, dtype=torch.int64, device=device)
    rows = torch.zeros(6, dtype=torch.int64, device=device)
    return [
        (lambda h, w: linear_token_logprobs(h, w, labels), (4, 6)),
        (lambda h, w: linear_token_logprobs(h, w, labels, bias=w[:, 0], memory_budget="1MB", shift=True), (4, 6)),
        (lambda h, w: linear_token_logprobs(h, w, labels, gradient_filter=1e-3), (4, 6)),
        (lambda h, w: linear_token_logprobs(h, w, labels, outputs=OUTPUTS).entropy, (4, 6)),
        (lambda h, w: linear_token_logprobs(h.flatten(0, 1), w, labels[0], rows=rows), (6,)),
        (lambda h, w: linear_rpo_loss(h, w, labels, rewards, **ref).loss, ()),
        (lambda h, w: linear_rpo_loss(h, w, labels, rewards, ref_hidden=h.detach(), ref_weight=w.detach()).loss, ()),
        (lambda h, w: linear_rpo_loss(h, w, labels, rewards, group_ids=[0, 1, 1, 1], **ref).group_losses, (2,)),
        (
            lambda h, w: (
                linear_rpo_loss(
                    h.flatten(0, 1), w, labels.flatten(), rewards, cu_seqlens=offsets, **ref
                ).implicit_rewards
            ),
            (4,),
        ),
    ]


def assert_shapes(device, dtype):
    for call, shape in head_calls(device):
        hidden = torch.empty(4, 6, 16, dtype=dtype, device=device, requires_grad=True)
        weight = torch.empty(90, 16, dtype=dtype, device=device, requires_grad=True)
        result = call(hidden, weight)
        assert result.shape == shape and result.dtype == torch.promote_types(dtype, torch.float32)
        if result.requires_grad:
            result.sum().backward()
            for leaf in (hidden, weight):
                assert leaf.grad.shape == leaf.shape and leaf.grad.dtype == dtype and leaf.grad.device == leaf.device


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_meta_and_fake_tensors_at_the_head(dtype):
    assert_shapes("meta", dtype)
    with FakeTensorMode():
        assert_shapes("cpu", dtype)
