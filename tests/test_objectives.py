"""The group level against formulas written out by hand, and gradients by gradcheck."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from rpo_kernels import CDPO, DPO, IPO, RPO, DistilledDPO, SimPO
from rpo_kernels.objectives import ranking_metrics

BETA, ETA = 0.3, 1.7
DISTANCES = ("bwd_kl", "fwd_kl", "sq")


def draw(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bernoulli_kl(a, b):
    """KL(sigmoid(a) || sigmoid(b)), the form NeMo-Aligner writes on margins."""
    return a.sigmoid() * (logsigmoid(a) - logsigmoid(b)) + (-a).sigmoid() * (logsigmoid(-a) - logsigmoid(-b))


@pytest.mark.parametrize("distance", DISTANCES)
def test_two_responses_are_nemos_pairwise_forms(distance):
    ratios, rewards = draw(50, 2), draw(50, 2, seed=1)
    policy_margin = BETA * (ratios[:, 0] - ratios[:, 1])
    reward_margin = ETA * (rewards[:, 0] - rewards[:, 1])
    nemo = {
        "bwd_kl": bernoulli_kl(reward_margin, policy_margin),
        "fwd_kl": bernoulli_kl(policy_margin, reward_margin),
        "sq": (policy_margin - reward_margin) ** 2 / 2,  # rpo_sq without the 1/2 in NeMo
    }
    torch.testing.assert_close(RPO(distance, beta=BETA, eta=ETA)(ratios, rewards), nemo[distance])


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("distance", DISTANCES)
def test_gradients_are_the_designs(distance, size):
    ratios, rewards = draw(7, size).requires_grad_(), draw(7, size, seed=1)
    objective = RPO(distance, beta=BETA, eta=ETA)
    losses = objective(ratios, rewards)
    (grad,) = torch.autograd.grad(losses.sum(), ratios)
    a, b = BETA * ratios.detach(), ETA * rewards
    p, q, d = a.softmax(-1), b.softmax(-1), a - b
    log_gap = a.log_softmax(-1) - b.log_softmax(-1)
    by_hand = {
        "bwd_kl": p - q,
        "fwd_kl": p * (log_gap - losses.detach().unsqueeze(-1)),
        "sq": (d - (d.sum(-1, keepdim=True) - d) / max(size - 1, 1)) / max(size - 1, 1) if size > 1 else 0 * d,
    }
    torch.testing.assert_close(grad, BETA * by_hand[distance])
    torch.autograd.gradcheck(lambda r: objective(r, rewards), (ratios,))


def test_sq_is_the_leave_one_out_square():
    ratios, rewards = draw(4, 5), draw(4, 5, seed=1)
    d = BETA * ratios - ETA * rewards
    by_hand = sum((d[:, k] - d[:, [j for j in range(5) if j != k]].mean(-1)) ** 2 for k in range(5)) / 10
    torch.testing.assert_close(RPO("sq", beta=BETA, eta=ETA)(ratios, rewards), by_hand)


@pytest.mark.parametrize("distance", DISTANCES)
def test_one_response_has_no_loss_and_no_gradient(distance):
    ratios = draw(3, 1).requires_grad_()
    losses = RPO(distance)(ratios, draw(3, 1, seed=1))
    losses.sum().backward()
    assert losses.eq(0).all() and ratios.grad.eq(0).all()


@pytest.mark.parametrize("objective", [*map(RPO, DISTANCES), DPO(), CDPO(), SimPO()], ids=repr)
def test_ragged_groups_equal_their_groups_alone(objective):
    ratios, rewards = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    sizes = (4, 1, 2)
    present = torch.tensor([[k < size for k in range(4)] for size in sizes])
    losses = objective(ratios, rewards, present)
    alone = torch.cat([objective(ratios[g : g + 1, :size], rewards[g : g + 1, :size]) for g, size in enumerate(sizes)])
    torch.testing.assert_close(losses, alone)
    (grad,) = torch.autograd.grad(losses.sum(), ratios)
    assert grad[~present].eq(0).all() and grad.isfinite().all()
    (expected,) = torch.autograd.grad(alone.sum(), ratios)
    torch.testing.assert_close(grad, expected)


def chosen_first(count, seed=1):
    return draw(count, 2, seed=seed).sort(-1, descending=True).values


def test_dpo_is_its_papers_formula():
    ratios = draw(50, 2)
    expected = -logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1]))
    torch.testing.assert_close(DPO(BETA)(ratios, chosen_first(50)), expected)


def test_cdpo_is_its_papers_formula_up_to_the_noise_entropy():
    ratios, eps = draw(50, 2), 0.2
    margin = BETA * (ratios[:, 0] - ratios[:, 1])
    paper = -(1 - eps) * logsigmoid(margin) - eps * logsigmoid(-margin)
    entropy = -(1 - eps) * math.log(1 - eps) - eps * math.log(eps)
    torch.testing.assert_close(CDPO(BETA, eps)(ratios, chosen_first(50)) + entropy, paper)


def test_ipo_is_its_papers_formula():
    ratios = draw(50, 2)
    expected = (ratios[:, 0] - ratios[:, 1] - 1 / (2 * BETA)) ** 2
    torch.testing.assert_close(IPO(BETA)(ratios, chosen_first(50)), expected)


def test_simpo_is_its_papers_formula():
    mean_logps = draw(50, 2)  # length-normalised log-probabilities
    expected = -logsigmoid(2.5 * (mean_logps[:, 0] - mean_logps[:, 1]) - 1.4)
    objective = SimPO(beta=2.5, gamma=1.4)
    torch.testing.assert_close(objective(mean_logps, chosen_first(50)), expected)
    assert objective.reference_free and objective.length_normalize


def test_distilled_dpo_is_its_papers_formula():
    ratios, rewards = draw(50, 2), draw(50, 2, seed=1)
    gap = (rewards[:, 0] - rewards[:, 1]) - BETA * (ratios[:, 0] - ratios[:, 1])
    torch.testing.assert_close(DistilledDPO(BETA)(ratios, rewards), gap**2)


def test_sq_at_the_reference_is_reinforce_leave_one_out():
    rewards = draw(6, 4, seed=1)
    ratios = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    RPO("sq", beta=BETA, eta=ETA)(ratios, rewards).sum().backward()
    advantage = rewards - (rewards.sum(-1, keepdim=True) - rewards) / 3
    # One constant for all groups, and descent raises what has an advantage.
    torch.testing.assert_close(ratios.grad, -BETA * ETA / 3 * advantage)


def test_infinite_target_with_ties_shares_the_target():
    ratios = draw(1, 3).requires_grad_()
    loss = DPO(1.0)(ratios, torch.tensor([[2.0, 2.0, 1.0]], dtype=torch.float64))
    log_p = ratios.detach().log_softmax(-1)[0]
    torch.testing.assert_close(loss[0], math.log(0.5) - (log_p[0] + log_p[1]) / 2)
    (grad,) = torch.autograd.grad(loss.sum(), ratios)
    torch.testing.assert_close(grad[0], log_p.exp() - torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))


def test_infinite_target_is_the_limit_of_a_large_one():
    ratios, rewards = draw(20, 4), draw(20, 4, seed=1)
    torch.testing.assert_close(DPO()(ratios, rewards), RPO("bwd_kl", beta=0.1, target_margin=60.0)(ratios, rewards))


@given(st.integers(1, 6), st.sampled_from(DISTANCES), st.floats(-1e4, 1e4), st.integers(0, 9999))
def test_losses_are_finite_not_negative_and_blind_to_a_common_shift(size, distance, shift, seed):
    ratios, rewards = draw(3, size, seed=seed, scale=50), draw(3, size, seed=seed + 1, scale=50)
    objective = RPO(distance)
    losses = objective(ratios, rewards)
    assert losses.isfinite().all() and (losses > -1e-9).all()
    torch.testing.assert_close(objective(ratios + shift, rewards - shift), losses, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("objective", [*map(RPO, DISTANCES), DPO(), CDPO()], ids=repr)
def test_a_reward_that_is_not_finite_shows(objective, bad):
    rewards, ratios = draw(2, 3, seed=1), draw(2, 3).requires_grad_()
    rewards[0, 1] = bad
    losses = objective(ratios, rewards)
    (grad,) = torch.autograd.grad(losses.sum(), ratios)
    assert losses[0].isnan() and losses[1].isfinite()
    assert grad[0].isnan().any() and grad[1].isfinite().all()


def test_accuracy_and_margin():
    rewards = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    implicit = torch.tensor([[0.5, 0.1, 0.9], [2.0, -1.0, 2.0]])
    # Group 0: 0>1 right, 0>2 wrong, 2>1 right. Group 1: 0>2 tie, 1>2 wrong; 0 and 1 have equal rewards.
    accuracy, margin = ranking_metrics(implicit, rewards)
    assert accuracy.item() == pytest.approx(2.5 / 5)
    assert margin.item() == pytest.approx(((0.5 - 0.1) + (2.0 - 2.0)) / 2)
    present = torch.tensor([[True, True, True], [True, False, False]])
    accuracy, margin = ranking_metrics(implicit, rewards, present)
    assert accuracy.item() == pytest.approx(2 / 3) and margin.item() == pytest.approx(0.4)
    assert ranking_metrics(implicit[:, :1], rewards[:, :1])[0].isnan()


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (dict(distance="kl"), "distance"),
        (dict(beta=0.0), "beta"),
        (dict(beta=math.inf), "beta"),
        (dict(eta=-1.0), "eta"),
        (dict(gamma=math.nan), "gamma"),
        (dict(target_margin=math.nan), "target_margin"),
        (dict(distance="fwd_kl", target_margin=math.inf), "target_margin"),
        (dict(distance="sq", target_margin=math.inf), "target_margin"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        RPO(**arguments)


def test_bad_preset_arguments_are_named():
    with pytest.raises(ValueError, match="epsilon"):
        CDPO(epsilon=0.5)
    with pytest.raises(ValueError, match="beta"):
        IPO(beta=0.0)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, -0.1, 1.0])
def test_label_noise_lies_between_none_and_a_half(epsilon):
    with pytest.raises(ValueError, match="epsilon must lie in"):
        CDPO(epsilon=epsilon)


def test_defaults_of_distilled_dpo():
    """`(0.1 log-ratio margin - reward margin)^2`."""
    losses = DistilledDPO()(torch.tensor([[30.0, 10.0]]), torch.tensor([[1.0, 0.5]]))
    torch.testing.assert_close(losses, torch.tensor([(0.1 * 20 - 0.5) ** 2]))
