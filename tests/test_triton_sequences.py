"""The fused reduction against a float64 reference written from the formulas, and against the torch implementation."""

import math
from itertools import pairwise

import pytest
import torch

from rpo_kernels.objectives import DPO, IPO, RPO, SimPO
from rpo_kernels.sequences import Groups

triton_sequences = pytest.importorskip("rpo_kernels.fused.kernel", exc_type=ImportError)
sequence_reduce = triton_sequences.sequence_reduce

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

OBJECTIVES = {
    "bwd_kl": RPO("bwd_kl", beta=0.3, eta=0.7),
    "fwd_kl": RPO("fwd_kl", beta=0.3, eta=0.7),
    "sq": RPO("sq", beta=0.3, eta=0.7),
    "dpo": DPO(beta=0.2),
    "cdpo": RPO("bwd_kl", beta=0.2, target_margin=math.log(9)),
    "fwd margin": RPO("fwd_kl", beta=0.2, target_margin=1.5),
    "ipo": IPO(beta=0.4),
    "simpo": SimPO(beta=2.0, gamma=1.0),
    "normalised sq": RPO("sq", beta=2.0, length_normalize=True),
}


def reference_sums(logps, labels, weights, cu_seqlens, shift, ignore_index=-100):
    """Sums and numbers of scored tokens, one sequence and one token after the other."""
    if cu_seqlens is None:
        rows = [[(b, t) for t in range(labels.shape[1])] for b in range(labels.shape[0])]
    else:
        rows = [[(t,) for t in range(first, last)] for first, last in pairwise(cu_seqlens.tolist())]
    sums, lengths = [], []
    for row in rows:
        scored = [at for n, at in enumerate(row) if labels[at] != ignore_index and not (shift and n == 0)]
        terms = [logps[at] * (1 if weights is None else weights[at]) for at in scored]
        sums.append(sum(terms) if terms else torch.zeros((), dtype=torch.float64))
        lengths.append(len(scored))
    return torch.stack(sums), torch.tensor(lengths, dtype=torch.float64)


def reference_group_loss(a, rewards, objective):
    """Loss of one group of K responses, from DESIGN's table, by loops."""
    size = len(a)
    best = rewards == rewards.max()
    a = a - objective.gamma * best
    if objective.target_margin == math.inf:
        q = best / best.sum()
    else:
        b = objective.eta * rewards if objective.target_margin is None else objective.target_margin * best.double()
        q = torch.softmax(b, 0)
    p = torch.softmax(a, 0)
    if objective.distance == "bwd_kl":
        return sum(q[k] * (q[k].log() - torch.log_softmax(a, 0)[k]) for k in range(size) if q[k] > 0)
    if objective.distance == "fwd_kl":
        return sum(p[k] * (torch.log_softmax(a, 0)[k] - torch.log_softmax(b, 0)[k]) for k in range(size))
    if size == 1:
        return a.sum() * 0
    d = a - b
    return sum((d[k] - (d.sum() - d[k]) / (size - 1)) ** 2 for k in range(size)) / (2 * size)


def reference(token_logps, labels, rewards, members, objective, ref_logps, weights, cu_seqlens, shift):
    """Everything `sequence_reduce` returns, in float64; the gradient by autograd."""
    logps, lengths = reference_sums(token_logps.double(), labels, weights, cu_seqlens, shift)
    logps = logps.detach().requires_grad_()
    refs = torch.zeros_like(lengths)
    if ref_logps is not None:
        refs = ref_logps.double()
        if ref_logps.shape == labels.shape:
            refs, _ = reference_sums(refs, labels, weights, cu_seqlens, shift)
    implicit = objective.beta * (logps - refs)
    if objective.length_normalize:
        implicit = implicit / lengths.clamp(min=1)
    losses = torch.stack([reference_group_loss(implicit[m], rewards[m].double(), objective) for m in members])
    losses.mean().backward()
    implicit = implicit.detach()

    scores, spreads = [], []
    for group in members:
        r = rewards[group]
        for i in group:
            for j in group:
                if rewards[i] > rewards[j]:
                    scores.append(1.0 if implicit[i] > implicit[j] else 0.5 if implicit[i] == implicit[j] else 0.0)
        if r.max() > r.min():
            spreads.append(implicit[group[int(r.argmax())]] - implicit[group[int(r.argmin())]])
    mean = lambda x: torch.tensor(x, dtype=torch.float64).mean()  # noqa: E731
    losses = losses.detach()
    return losses.mean(), losses, logps.detach(), refs, implicit, mean(scores), mean(spreads), logps.grad


def make_batch(device, num_sequences, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(num_sequences, length, generator=generator)
    labels = torch.randint(50, (num_sequences, length), generator=generator)
    labels[torch.rand(num_sequences, length, generator=generator) < 0.3] = -100
    logps[labels == -100] = 0
    refs = logps + 0.5 * torch.randn(num_sequences, length, generator=generator)
    rewards = torch.randint(4, (num_sequences,), generator=generator).float()  # with ties
    weights = torch.rand(num_sequences, length, generator=generator)
    return [x.to(device) for x in (logps, labels, rewards, refs, weights)]


def check(
    logps, labels, rewards, groups, members, objective, ref_logps=None, token_weights=None, cu_seqlens=None, shift=False
):
    result = sequence_reduce(
        logps,
        labels,
        rewards,
        groups,
        objective,
        **{"ref_sums" if ref_logps is not None and ref_logps.shape != labels.shape else "ref_logps": ref_logps},
        token_weights=token_weights,
        cu_seqlens=cu_seqlens,
        shift=shift,
    )
    on_cpu = [None if x is None else x.cpu() for x in (ref_logps, token_weights, cu_seqlens)]
    expected = reference(logps.cpu(), labels.cpu(), rewards.cpu(), members, objective, *on_cpu, shift)
    for name, value, target in zip(result._fields, result, expected):
        assert value.dtype == torch.float32
        torch.testing.assert_close(
            value.double().cpu(), target, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
    return result


def grouped(count, size):
    return Groups(count, size, size, 1), [[g * size + k for k in range(size)] for g in range(count)]


def stacked(count, size):
    return Groups(count, size, 1, count), [[g + k * count for k in range(size)] for g in range(count)]


def ragged(device):
    """Groups of 3, 1, 4 and 2 of ten sequences, in no order."""
    members = [[4, 0, 9], [2], [1, 3, 5, 8], [7, 6]]
    index = torch.tensor([m + [-1] * (4 - len(m)) for m in members], device=device)
    return Groups(4, 4, index=index), members


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
@pytest.mark.parametrize("size", [2, 5])
def test_objectives_and_group_sizes(device, objective, size):
    groups, members = grouped(4, size)
    logps, labels, rewards, refs, _ = make_batch(device, 4 * size, 6, seed=size)
    check(logps, labels, rewards, groups, members, objective, None if objective.reference_free else refs)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_ragged_groups(device, objective):
    groups, members = ragged(device)
    logps, labels, rewards, refs, weights = make_batch(device, 10, 5)
    check(logps, labels, rewards, groups, members, objective, refs, weights)


def test_stacked_layout(device):
    groups, members = stacked(3, 4)
    logps, labels, rewards, refs, _ = make_batch(device, 12, 7)
    check(logps, labels, rewards, groups, members, OBJECTIVES["bwd_kl"], refs)


@pytest.mark.parametrize("reference_kind", ["none", "token", "sequence"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shift", [False, True])
def test_references_weights_and_shift(device, reference_kind, weighted, shift):
    groups, members = grouped(2, 3)
    logps, labels, rewards, refs, weights = make_batch(device, 6, 9)
    labels[:, 0] = 7
    ref_logps = {"none": None, "token": refs, "sequence": refs.sum(-1)}[reference_kind]
    objective = RPO("sq", beta=0.5, length_normalize=weighted)
    check(logps, labels, rewards, groups, members, objective, ref_logps, weights if weighted else None, shift=shift)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("reference_kind", ["none", "token", "sequence"])
def test_packed(device, dtype, reference_kind):
    lengths = [5, 1, 0, 13, 2, 7]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype, device=device)
    logps, labels, _, refs, weights = (x.flatten() for x in make_batch(device, 4, 7))
    rewards = torch.tensor([1.0, 2.0, 0.0, 3.0, 3.0, -1.0], device=device)
    groups, members = grouped(2, 3)
    objective = RPO("bwd_kl", beta=0.5, length_normalize=True)
    ref_logps = {"none": None, "token": refs, "sequence": torch.arange(6.0, device=device) - 9}[reference_kind]
    check(logps, labels, rewards, groups, members, objective, ref_logps, weights, cu_seqlens)


@pytest.mark.parametrize("objective", [OBJECTIVES["fwd_kl"], OBJECTIVES["normalised sq"]], ids=["fwd_kl", "sq"])
@pytest.mark.parametrize("layout", [grouped, stacked])
def test_several_blocks(device, monkeypatch, objective, layout):
    """Blocks of 4 sequences by 8 tokens and of 2 groups; the last ones partial."""
    monkeypatch.setattr(
        triton_sequences, "choose_blocks", lambda *_: dict(SEQUENCES=4, TOKENS=8, GROUPS=2, RESPONSES=4)
    )
    groups, members = layout(5, 3)
    logps, labels, rewards, refs, weights = make_batch(device, 15, 19)
    check(logps, labels, rewards, groups, members, objective, refs, weights)


def test_several_blocks_packed(device, monkeypatch):
    monkeypatch.setattr(
        triton_sequences, "choose_blocks", lambda *_: dict(SEQUENCES=2, TOKENS=4, GROUPS=1, RESPONSES=2)
    )
    cu_seqlens = torch.tensor([0, 9, 10, 10, 15, 27, 28], device=device)
    logps, labels, _, refs, _ = (x.flatten() for x in make_batch(device, 4, 7))
    rewards = torch.arange(6.0, device=device)
    check(logps, labels, rewards, *grouped(3, 2), OBJECTIVES["bwd_kl"], refs, cu_seqlens=cu_seqlens)


def test_strided_tokens(device):
    groups, members = grouped(2, 2)
    logps, labels, rewards, refs, weights = make_batch(device, 4, 12)
    wide = torch.cat([labels, labels], dim=1)
    check(logps[:, 3:], wide[:, 15:], rewards, groups, members, DPO(), refs[:, 3:], weights[:, 3:].T.contiguous().T)
    check(logps, labels, rewards, groups, members, DPO(), refs, weights[:, :1].expand(4, 12))


def test_unscored_tokens_are_not_summed(device):
    groups, members = grouped(2, 2)
    logps, labels, rewards, refs, weights = make_batch(device, 4, 8)
    labels[2] = -100  # a sequence of nothing
    for values in (refs, weights):
        values[labels == -100] = torch.nan
    result = check(logps, labels, rewards, groups, members, RPO(length_normalize=True), refs, weights)
    assert result.logps[2] == 0 and result.implicit_rewards[2] == 0


def test_no_pairs_give_nan_metrics(device):
    groups, members = grouped(2, 2)
    logps, labels, rewards, refs, _ = make_batch(device, 4, 3)
    result = check(logps, labels, torch.ones_like(rewards), groups, members, RPO(), refs)
    assert result.accuracy.isnan() and result.margin.isnan()
    assert result.loss.isfinite()


def test_policy_equal_to_reference_scores_one_half(device):
    groups, members = grouped(3, 3)
    logps, labels, rewards, _, _ = make_batch(device, 9, 4)
    result = check(logps, labels, rewards, groups, members, RPO(), logps)
    assert result.accuracy == 0.5 and result.margin == 0


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("bwd_kl", math.nan),
        ("fwd_kl", math.nan),
        ("sq", math.nan),
        ("dpo", math.nan),
        ("dpo", math.inf),
        ("sq", -math.inf),
    ],
)
def test_rewards_that_are_not_finite_show(device, name, bad):
    groups, _ = grouped(2, 2)
    logps, labels, rewards, refs, _ = make_batch(device, 4, 3)
    rewards[1] = bad
    result = sequence_reduce(logps, labels, rewards, groups, OBJECTIVES[name], ref_logps=refs)
    assert result.loss.isnan() and result.group_losses.isnan().tolist() == [True, False]
    assert result.coef.isnan().tolist() == [True, True, False, False]


@pytest.mark.parametrize("name", ["bwd_kl", "fwd_kl", "sq", "dpo"])
def test_far_apart_responses(device, name):
    """Log-ratios hundreds apart: probabilities underflow, 0 log 0 is 0, and the loss stays finite."""
    groups, members = grouped(2, 3)
    logps, labels, rewards, _, _ = make_batch(device, 6, 4)
    labels[:] = 1
    logps += torch.tensor([[0.0], [-900], [-400], [-3000], [0], [-20]], device=device)
    result = check(logps, labels, rewards, groups, members, OBJECTIVES[name])
    assert result.loss.isfinite() and result.coef.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("is_ragged", [False, True])
def test_agrees_with_the_torch_objective(device, name, is_ragged):
    objective = OBJECTIVES[name]
    groups = ragged(device)[0] if is_ragged else grouped(5, 2)[0]
    logps, labels, rewards, _, _ = make_batch(device, 10, 6)
    result = sequence_reduce(logps, labels, rewards, groups, objective)
    sums = result.logps.clone().requires_grad_()
    lengths = (labels != -100).sum(-1).clamp(min=1) if objective.length_normalize else 1
    losses = objective(groups.gather(sums / lengths), groups.gather(rewards), groups.present)
    losses.mean().backward()
    torch.testing.assert_close(result.group_losses, losses.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(result.coef, sums.grad, rtol=1e-5, atol=1e-6)


def test_same_input_same_bits(device):
    groups, _ = grouped(4, 3)
    logps, labels, rewards, refs, _ = make_batch(device, 12, 33)
    runs = [sequence_reduce(logps, labels, rewards, groups, RPO(), ref_logps=refs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_choose_blocks():
    choose = triton_sequences.choose_blocks
    assert choose(8, 2048, 2, 4) == dict(SEQUENCES=8, TOKENS=256, GROUPS=2, RESPONSES=4)
    assert choose(1000, 100, 250, 4) == dict(SEQUENCES=16, TOKENS=128, GROUPS=256, RESPONSES=4)
    assert choose(1, 1, 1, 1) == dict(SEQUENCES=1, TOKENS=1, GROUPS=1, RESPONSES=1)
    assert choose(3000, 7, 1, 3000) == dict(SEQUENCES=256, TOKENS=8, GROUPS=1, RESPONSES=4096)
