"""Liger's classes on our head against Liger's own: losses, everything else they return, and gradients."""

import inspect

import pytest
import torch

chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")

from rpo_kernels.integrations import liger  # noqa: E402

BATCH, TOKENS, WIDTH, VOCAB = 4, 6, 16, 50


def randn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)


def tensors(bias=True):
    """Policy (with gradients), reference and labels; some positions are not scored."""
    target = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    target[:, 0] = -100
    target[1, 4:] = -100
    hidden = randn(BATCH, TOKENS, WIDTH).requires_grad_()
    weight = randn(VOCAB, WIDTH, seed=2, scale=0.5).requires_grad_()
    offset = randn(VOCAB, seed=3).requires_grad_() if bias else None
    reference = dict(
        ref_input=randn(BATCH, TOKENS, WIDTH, seed=4),
        ref_weight=randn(VOCAB, WIDTH, seed=5, scale=0.5),
        ref_bias=randn(VOCAB, seed=6),
    )
    return hidden, weight, offset, target, reference


def compare(name, options, call, policy):
    """The same loss, other results and gradients from both classes."""
    results = []
    for home in (chunked_loss, liger):
        loss, rest = call(getattr(home, name)(compiled=False, **options))
        gradients = torch.autograd.grad(3 * loss, policy)
        results.append((loss, tuple(x.detach().float() for x in rest), gradients))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
    assert not any(x.requires_grad for x in call(getattr(liger, name)(**options))[1])


@pytest.mark.parametrize(
    "options",
    [dict(loss_type=name) for name in sorted(chunked_loss.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES - {"exo_pair"})]
    + [
        dict(loss_type="exo_pair", label_smoothing=1e-3),
        dict(compute_nll_loss=True, alpha=0.5),
        dict(average_log_prob=True),
        dict(use_ref_model=False),
    ],
    ids=str,
)
def test_dpo(options):
    hidden, weight, bias, target, reference = tensors()
    compare(
        "LigerFusedLinearDPOLoss",
        options,
        lambda loss: loss(weight, hidden, target, bias, **reference),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize(
    "name, options",
    [
        ("SimPO", dict(gamma=0.3)),
        ("SimPO", dict(compute_nll_loss=False, label_smoothing=0.1)),
        ("CPO", {}),
        ("CPO", dict(average_log_prob=True, alpha=0.5)),
        ("ORPO", {}),
        ("ORPO", dict(compute_nll_loss=False)),
    ],
    ids=str,
)
def test_losses_without_a_reference(name, options):
    hidden, weight, _, target, _ = tensors(bias=False)
    compare(f"LigerFusedLinear{name}Loss", options, lambda loss: loss(weight, hidden, target), (hidden, weight))


def test_orpo_with_other_labels_for_its_likelihood():
    hidden, weight, bias, target, _ = tensors()
    labels = target.masked_fill(target == -100, 7)
    compare(
        "LigerFusedLinearORPOLoss",
        {},
        lambda loss: loss(weight, hidden, target, bias, nll_target=labels),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("options", [dict(use_ref_model=True), {}, dict(average_log_prob=True)], ids=str)
@pytest.mark.parametrize("kl", [None, torch.tensor(0.2)], ids=["no kl", "kl"])
def test_kto(options, kl):
    hidden, weight, bias, target, reference = tensors()
    good = torch.tensor([True, False, False, True])
    compare(
        "LigerFusedLinearKTOLoss",
        options,
        lambda loss: loss(hidden, weight, target, bias, good, **reference, kl=kl),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize(
    "options",
    [dict(loss_type=name) for name in ("dapo", "grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")]
    + [
        dict(loss_type="dr_grpo", max_completion_length=8),
        dict(importance_sampling_level="sequence"),
        dict(beta=0.0, use_ref_model=False),
        dict(temperature=0.7, delta=2.0, use_bias_correction_kl=True),
    ],
    ids=str,
)
def test_grpo(options):
    hidden, weight, bias, target, reference = tensors()
    ids, mask = target.clamp(min=0), (target != -100).long()
    compare(
        "LigerFusedLinearGRPOLoss",
        options,
        lambda loss: loss(
            hidden, weight, ids, mask, randn(BATCH, seed=7), bias, None, randn(BATCH, TOKENS, seed=8) - 4, **reference
        ),
        (hidden, weight, bias),
    )


def test_tokens_left_out_do_not_overflow():
    """However small their old probability was."""
    hidden, weight, bias, target, reference = tensors()
    mask = (target != -100).long()
    old = torch.full((BATCH, TOKENS), -4.0).masked_fill(mask == 0, -1e4)
    loss = liger.LigerFusedLinearGRPOLoss()
    value, _ = loss(hidden, weight, target.clamp(min=0), mask, randn(BATCH), bias, None, old, **reference)
    assert value.isfinite() and torch.autograd.grad(value, hidden)[0].isfinite().all()


@pytest.mark.parametrize("name", liger.__all__)
def test_the_arguments_are_ligers(name):
    """Positions and names of `forward`, and Liger's own class as a base."""
    mine, theirs = getattr(liger, name), getattr(chunked_loss, name)
    assert issubclass(mine, theirs)
    assert list(inspect.signature(mine.forward).parameters) == list(inspect.signature(theirs.forward).parameters)
    loss = mine(memory_budget="1MB", gradient_filter=2**-16)
    assert (loss.memory_budget, loss.gradient_filter) == ("1MB", 2**-16)


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, bias, target, reference = tensors()
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    loss, _ = liger.LigerFusedLinearDPOLoss()(weight, hidden, target, bias, **reference)
    loss.backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
