"""The head's operator under torch's machinery, and its errors."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from head_cases import OPS, expected, factors_for, make
from rpo_kernels import linear_rpo_loss, linear_token_logprobs
from rpo_kernels.head.schedule import Saved
from rpo_kernels.kernels.interface import TokenOptions

pytestmark = pytest.mark.usefixtures("small_tiles")
INTERPRETED = False


@pytest.mark.parametrize("gradient_filter", [None, 2**-10])
@pytest.mark.parametrize("outputs", [[], ["entropy", "is_top1"]])
def test_opcheck(backend, backend_device, gradient_filter, outputs):
    hidden, weight, bias, labels = make((2, 6), device=backend_device, bias=True)
    rows = hidden.detach().flatten(0, 1).requires_grad_()
    options = {**TokenOptions(shift=True)._asdict(), "gradient_filter": gradient_filter, "backend": backend}
    options |= dict(entropy_grad=bool(outputs), outputs=outputs)
    needs = dict(needs_hidden=True, needs_weight=True)
    forward = {**options, **needs, "memory_budget": 10**6, "inplace_backward": False}
    arguments = (rows, weight, bias, labels)
    torch.library.opcheck(OPS.linear_token_logprobs, arguments, forward, rtol=1e-4, atol=1e-5)
    arguments = tuple(x.detach() for x in arguments)
    logps, _, entropy, _, *saved = OPS.linear_token_logprobs(*arguments, **forward)
    torch.library.opcheck(
        OPS.linear_token_logprobs_grad,
        (*arguments, torch.ones_like(logps), torch.ones_like(entropy) if outputs else None, saved),
        {**options, **needs, "needs_bias": True},
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_compiles_to_one_graph(backend, backend_device, frozen):
    hidden, weight, _, labels = make(device=backend_device)
    weight.requires_grad_(not frozen)

    def step(hidden, weight):
        return linear_token_logprobs(hidden * 2, weight, labels, shift=True, backend=backend).sum()

    torch._dynamo.reset()
    wanted = (hidden,) if frozen else (hidden, weight)
    plain = torch.autograd.grad(step(hidden, weight), wanted)
    compiled = torch.compile(step, fullgraph=True)(hidden, weight)
    torch.testing.assert_close(compiled, step(hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(compiled, wanted), plain)


def test_activation_checkpointing(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)

    def loss(hidden, weight):
        return linear_token_logprobs(hidden * 2, weight, labels, backend=backend).sum()

    plain = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    for reentrant in (False, True):
        again = checkpoint(loss, hidden, weight, use_reentrant=reentrant)
        if reentrant:  # supports only backward()
            again.backward()
            got = (hidden.grad, weight.grad)
        else:
            got = torch.autograd.grad(again, (hidden, weight))
        assert all(torch.equal(x, y) for x, y in zip(got, plain))


def test_autocast_casts_as_a_linear_layer(backend, backend_device):
    hidden, weight, bias, labels = make(device=backend_device, bias=True)
    with torch.autocast(backend_device, torch.bfloat16):
        logps = linear_token_logprobs(hidden, weight, labels, bias=bias, backend=backend)
    rounded = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight, bias)]
    plain = linear_token_logprobs(rounded[0], rounded[1], labels, bias=rounded[2], backend=backend)
    assert torch.equal(logps, plain)
    for mine, exact in zip(
        torch.autograd.grad(logps.sum(), (hidden, weight, bias)), torch.autograd.grad(plain.sum(), rounded)
    ):
        assert mine.dtype == torch.float32 and torch.equal(mine, exact.float())


def test_double_use_and_accumulation(backend, backend_device):
    """Hidden states and a tied weight used elsewhere too, and the loss summed over two halves of the batch."""
    hidden, weight, _, labels = make((4, 6), device=backend_device)

    def loss(rows):
        logps = linear_token_logprobs(hidden[rows], weight, labels[rows], backend=backend)
        again = linear_token_logprobs(2 * hidden[rows], weight, labels[rows], backend=backend)
        return (logps * factors_for(labels)[rows]).sum() + again.sum() + (weight**2).sum() + hidden[rows].sum()

    (loss(slice(0, 2)) + loss(slice(2, 4))).backward()
    got = hidden.grad, weight.grad
    _, once = expected(hidden, weight, None, labels, factors_for(labels))
    _, twice = expected(2 * hidden, weight, None, labels, torch.ones_like(factors_for(labels)))
    torch.testing.assert_close(got[0].double(), once[0] + 2 * twice[0] + 1, rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(got[1].double(), once[1] + twice[1] + 4 * weight.double(), rtol=1e-5, atol=5e-5)


def test_backward_twice(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)
    logps = linear_token_logprobs(hidden, weight, labels, backend=backend)
    first = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(logps.sum(), (hidden, weight), create_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(first, second))
    with pytest.raises(RuntimeError, match="differentiable once"):
        second[0].sum().backward()


def test_nothing_is_kept_without_grad(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)
    with torch.no_grad():
        assert not linear_token_logprobs(hidden, weight, labels, backend=backend).requires_grad
        outputs = OPS.linear_token_logprobs(
            *(hidden.flatten(0, 1), weight, None, labels),
            **TokenOptions()._asdict(),
            **dict(needs_hidden=False, needs_weight=False, memory_budget=None, gradient_filter=None, backend=backend),
            inplace_backward=True,
            outputs=[],
            entropy_grad=False,
        )
    saved = Saved(*outputs[4:])
    assert saved.kept.numel() == saved.grad_hidden.numel() == saved.references.numel() == 0


def test_errors_name_the_argument():
    hidden, weight, bias, labels = make(bias=True)
    for message, arguments in {
        "hidden must be floating": (hidden.detach().int(), weight, labels),
        "hidden must be .*, 24": (hidden[..., :5], weight, labels),
        "weight must be .V, H.": (hidden, weight[0], labels),
        "weight must have the hidden states' dtype": (hidden, weight.double(), labels),
        "labels must be int64": (hidden, weight, labels.float()),
        "labels must have the shape": (hidden, weight, labels[:, 1:]),
        "labels must lie in": (hidden, weight, labels + 1),
        "weight must be on": (hidden, weight.to("meta"), labels),
        "labels must be on": (hidden, weight, labels.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            linear_token_logprobs(*arguments)
    for message, options in {
        "bias must have one number for each row of weight, .700.": dict(bias=bias[1:]),
        "bias must have the hidden states' dtype": dict(bias=bias.half()),
        "temperature": dict(temperature=0.0),
        "softcap": dict(softcap=-1.0),
        "memory_budget": dict(memory_budget="plenty"),
        "gradient_filter": dict(gradient_filter=-1.0),
        "backend": dict(backend="fast"),
    }.items():
        with pytest.raises(ValueError, match=message):
            linear_token_logprobs(hidden, weight, labels, **options)
    rewards, ref = torch.randn(3), torch.randn(3)
    for message, options in {
        "not both": dict(ref_logps=ref, ref_hidden=hidden),
        "ref_hidden, which was not given": dict(ref_logps=ref, ref_weight=weight),
        "ref_logps must be given": dict(),
    }.items():
        with pytest.raises(ValueError, match=message):
            linear_rpo_loss(hidden, weight, labels, rewards, num_responses=3, **options)


def test_labels_out_of_range_read_nothing_out_of_bounds(backend, backend_device, monkeypatch):
    """As on an accelerator, where the range is not checked: -inf, and finite gradients."""
    monkeypatch.setattr("rpo_kernels.head.operator.check_label_range", lambda *_: None)
    hidden, weight, _, labels = make(device=backend_device)
    labels[0, :3] = torch.tensor([700, -7, 2**40], device=backend_device)
    logps = linear_token_logprobs(hidden, weight, labels, backend=backend)
    assert (logps[0, :3] == -torch.inf).all() and logps[0, 3:].isfinite().all()
    gradients = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert all(x.isfinite().all() for x in gradients)
