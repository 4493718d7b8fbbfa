"""rpo_loss, preference_loss and score_loss against the oracle: any groups, packing, reference and objective."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpo_kernels import RPO, linear_rpo_loss, preference_loss, rpo_loss, score_loss

from . import oracle

VOCAB = 23


@st.composite
def families(draw):
    """Arguments of `RPO`."""
    distance = draw(st.sampled_from(["bwd_kl", "fwd_kl", "sq"]))
    margins = [None, None, 0.7, -0.4] + [math.inf] * (distance == "bwd_kl")
    return dict(
        distance=distance,
        beta=draw(st.sampled_from([0.1, 1.0, 3.0])),
        eta=draw(st.sampled_from([0.5, 1.0, 4.0])),
        length_normalize=draw(st.booleans()),
        target_margin=draw(st.sampled_from(margins)),
        gamma=draw(st.sampled_from([0.0, 0.0, 1.5])),
    )


@st.composite
def groupings(draw):
    """(number of sequences, arguments that group them, members of each group in order)."""
    kind = draw(st.sampled_from(["grouped", "stacked", "ragged"]))
    if kind == "ragged":
        ids = draw(st.lists(st.sampled_from([7, -3, 2]), min_size=1, max_size=7))
        as_what = draw(st.sampled_from([list, torch.tensor]))
        members = [[i for i, x in enumerate(ids) if x == group] for group in dict.fromkeys(ids)]
        return len(ids), dict(group_ids=as_what(ids)), members
    groups, size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    first = [[g * size + k if kind == "grouped" else k * groups + g for k in range(size)] for g in range(groups)]
    return groups * size, dict(num_responses=size, layout=kind), first


@st.composite
def batches(draw):
    """A batch of log-probabilities, padded or packed, and everything that goes with it."""
    count, grouping, members = draw(groupings())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    packed, shift = draw(st.booleans()), draw(st.booleans())
    if packed:
        lengths = [draw(st.integers(0, 4)) for _ in range(count)]
        while sum(lengths) in (0, count):  # as many tokens as sequences are refused as ambiguous
            lengths[0] += 1
        ends = torch.tensor([0, *lengths]).cumsum(0)
        shape, layout = (sum(lengths),), dict(cu_seqlens=ends.to(draw(st.sampled_from([torch.int64, torch.int32]))))
        bounds = [[(t,) for t in range(int(ends[i]), int(ends[i + 1]))] for i in range(count)]
    else:
        shape, layout = (count, draw(st.integers(1, 5))), {}
        bounds = [[(i, t) for t in range(shape[1])] for i in range(count)]
    labels = torch.randint(VOCAB, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.4, 1.0]))] = -100
    logits = 3 * torch.randn(*shape, VOCAB, generator=generator)
    rewards = draw(
        st.sampled_from([torch.randn(count, generator=generator), torch.arange(count) % 3, torch.ones(count)])
    )
    weights = torch.rand(shape, generator=generator) if draw(st.booleans()) else None
    if weights is not None:
        weights[labels == -100] = draw(st.sampled_from([0.5, math.nan, math.inf]))
    reference = draw(st.sampled_from(["sums", "tokens", "logits", "free"]))
    return SimpleNamespace(
        logits=logits, labels=labels, rewards=rewards, weights=weights, shift=shift, bounds=bounds, members=members,
        given={**grouping, **layout}, reference=reference, other=logits.flip(-1) * 0.9,
        refs=-4 * torch.rand(shape, generator=generator), count=count,
    )  # fmt: skip


def expected(batch, family, logits):
    """The oracle's results for float64 logits."""

    def sums(tokens):
        return oracle.sequence_sums(tokens, batch.labels, batch.bounds, weights, -100, batch.shift)

    def logps_of(logits):  # the first token of a packed sequence is not predicted by the one before
        labels = batch.labels.clone()
        for positions in batch.bounds if batch.shift else []:
            if positions:
                labels[positions[0]] = -100
        return oracle.token_outputs(logits, labels, shift=batch.shift)["logps"]

    weights = None if batch.weights is None else batch.weights.double()
    logps, lengths = sums(logps_of(logits))
    refs = {
        "free": lambda: None,
        "sums": lambda: batch.sums.double(),
        "tokens": lambda: sums(batch.refs.double())[0],
        "logits": lambda: sums(logps_of(batch.other.double()))[0],
    }[batch.reference]()
    results = oracle.preference_loss(logps, refs, lengths, batch.rewards.double(), batch.members, family)
    return logps, refs, results


def reference_of(batch):
    batch.sums = -4 * torch.rand(batch.count, generator=torch.Generator().manual_seed(3))
    return {
        "free": {},
        "sums": dict(ref_logps=batch.sums),
        "tokens": dict(ref_logps=batch.refs),
        "logits": dict(ref_logits=batch.other),
    }[batch.reference]


def compare(out, logps, refs, results):
    loss, losses, implicit, accuracy, margin = results
    wanted = dict(loss=loss, group_losses=losses, logps=logps, ref_logps=refs, implicit_rewards=implicit)
    wanted |= dict(accuracy=torch.tensor(accuracy), margin=torch.tensor(margin))
    for name, exact in wanted.items():
        value = getattr(out, name)
        if exact is None:
            assert value is None
            continue
        torch.testing.assert_close(
            value.detach().double(), exact.detach().double(), rtol=1e-4, atol=1e-4, equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


def clear_of_ties(implicit):
    """Implicit rewards that differ or are equal in every precision: what accuracy counts."""
    gaps = (implicit[:, None] - implicit[None]).abs()
    return bool(((gaps == 0) | (gaps > 1e-4)).all())


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_rpo_loss(backend, data):
    batch, family = data.draw(batches()), data.draw(families())
    exact = batch.logits.double().requires_grad_()
    given_reference = reference_of(batch)
    logps, refs, results = expected(batch, family, exact)
    if not clear_of_ties(results[2].detach()):
        return
    x = batch.logits.clone().requires_grad_()
    out = rpo_loss(
        x * 1, batch.labels, batch.rewards, objective=RPO(**family, reference_free=batch.reference == "free"),
        token_weights=batch.weights, shift=batch.shift, inplace_backward=data.draw(st.booleans()), backend=backend,
        **given_reference, **batch.given,
    )  # fmt: skip
    compare(out, logps, refs, results)
    if results[0].requires_grad:
        (grad,) = torch.autograd.grad(out.loss, x)
        (exact_grad,) = torch.autograd.grad(results[0], exact)
        assert (grad.double() - exact_grad).norm() <= 2e-5 * exact_grad.norm() + 1e-4


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_the_ways_to_one_loss_agree(data):
    """From logits, from hidden states, from log-probabilities: one loss, one gradient of the logits."""
    batch, family = data.draw(batches()), data.draw(families())
    if batch.reference == "logits":
        return
    backend, given_reference = data.draw(st.sampled_from(["native", "torch"])), reference_of(batch)
    objective = RPO(**family, reference_free=batch.reference == "free")
    arguments = dict(objective=objective, token_weights=batch.weights, shift=batch.shift, backend=backend)
    arguments |= given_reference | batch.given
    hidden = batch.logits[..., :VOCAB].clone().requires_grad_()
    weight = torch.eye(VOCAB)
    budget = data.draw(st.sampled_from([0, 2**20, None]))
    logits = batch.logits.clone().requires_grad_()
    one = rpo_loss(logits, batch.labels, batch.rewards, **arguments)
    other = linear_rpo_loss(hidden, weight, batch.labels, batch.rewards, memory_budget=budget, **arguments)
    for a, b in zip(one[:5], other[:5]):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if one.loss.requires_grad:
        grads = torch.autograd.grad(one.loss, logits)[0], torch.autograd.grad(other.loss, hidden)[0]
        torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    if not batch.shift:
        every = oracle.token_outputs(batch.logits.double(), batch.labels)["logps"].float()
        third = preference_loss(every, batch.labels, batch.rewards, **arguments)
        torch.testing.assert_close(third.group_losses, one.group_losses.detach(), rtol=1e-4, atol=1e-5)


@settings(settings.get_profile("fuzz"))
@given(data=st.data())
def test_properties_of_the_group_level(data):
    """Order of groups and responses, shifts of scores and rewards, and equal copies of the batch."""
    count, grouping, members = data.draw(groupings())
    family = data.draw(families()) | dict(length_normalize=False)
    backend = data.draw(st.sampled_from(["torch", "triton"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    scores = 3 * torch.randn(count, generator=generator)
    rewards = torch.randint(4, (count,), generator=generator).float()
    ids = torch.empty(count, dtype=torch.int64)
    for group, sequences in enumerate(members):
        ids[sequences] = group

    def run(scores, rewards, **grouping):
        leaf = scores.clone().requires_grad_()
        out = score_loss(leaf, rewards, objective=RPO(**family), backend=backend, **grouping)
        return out, torch.autograd.grad(out.loss, leaf)[0]

    def assert_same(one, other):
        for a, b in ((one[0].loss, other[0].loss), (one[0].accuracy, other[0].accuracy), (one[1], other[1])):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)

    base = run(scores, rewards, **grouping)
    exact = oracle.preference_loss(scores.double(), None, [1] * count, rewards.double(), members, family)
    torch.testing.assert_close(base[0].loss.detach().double(), exact[0], rtol=1e-4, atol=1e-4)
    assert_same(base, run(scores, rewards, group_ids=ids))
    order = torch.randperm(count, generator=generator)
    out, grad = run(scores[order], rewards[order], group_ids=ids[order])
    assert_same(base, (out, torch.empty_like(grad).scatter(0, order, grad)))
    assert_same(base, run(scores, rewards + 2, **grouping))  # only differences of rewards count, and of scores
    shifted = run(scores + 0.5, rewards, **grouping)
    torch.testing.assert_close(shifted[0].loss, base[0].loss, rtol=1e-3, atol=1e-4)
    copies = run(torch.cat((scores, scores)), torch.cat((rewards, rewards)), group_ids=torch.cat((ids, ids + 10)))
    assert_same((base[0], base[1] / 2), (copies[0], copies[1][:count]))
    assert torch.equal(copies[1][:count], copies[1][count:])
