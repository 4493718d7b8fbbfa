"""preference_loss and score_loss: the losses of who brings log-probabilities, or scores."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch

from rpo_kernels import DPO, IPO, RPO, SimPO, preference_loss, rpo_loss, score_loss, token_logprobs

EXAMPLES = Path(__file__).parents[1] / "examples"
OBJECTIVES = [RPO(), RPO("fwd_kl", beta=0.5), RPO("sq"), RPO("sq", length_normalize=True), DPO(), IPO(), SimPO()]


# Triton's interpreter computes in NumPy, which warns where what is masked out is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(params=["torch", "triton"])
def reduction(request, available_backend):
    """The unfused way to the loss, and the fused kernel; with the device."""
    return available_backend(request.param)


def make(device, count=6, length=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(count, length, 31, generator=generator)).to(device).requires_grad_()
    labels = torch.randint(31, (count, length), generator=generator)
    labels[:, :2] = -100
    labels[0, -1] = -100
    reference = -3 * torch.rand(count, length, generator=generator)
    return logits, labels.to(device), torch.randn(count, generator=generator).to(device), reference.to(device)


def assert_same(a, b, tolerance=1e-5):
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(("objective", "shift"), list(zip(OBJECTIVES, [False, True] * 4)), ids=str)
def test_preference_loss_is_rpo_loss_after_token_logprobs(reduction, objective, shift):
    backend, device = reduction
    logits, labels, rewards, reference = make(device)
    arguments = dict(
        ref_logps=None if objective.reference_free else reference,
        objective=objective,
        num_responses=3,
        layout="stacked",
        token_weights=torch.rand(labels.shape, generator=torch.Generator().manual_seed(3)).to(device),
        shift=shift,
    )
    expected = rpo_loss(logits, labels, rewards, backend="torch", **arguments)
    logps = token_logprobs(logits, labels, shift=shift, backend="torch")
    result = preference_loss(logps, labels, rewards, backend=backend, **arguments)
    assert_same(result, expected)
    gradients = [torch.autograd.grad(output.loss, logits) for output in (result, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


def test_preference_loss_of_packed_sequences_and_ragged_groups(reduction):
    backend, device = reduction
    logits, labels, rewards, reference = make(device)
    ids = [0, 1, 0, 1, 1, 2]
    padded = token_logprobs(logits, labels)
    lengths = torch.tensor([5, 3, 5, 4, 3, 5])  # those cut off here end in positions that are not scored
    labels = labels.clone()
    for row, length in enumerate(lengths):
        labels[row, length:] = -100
    kept = torch.arange(5) < lengths[:, None]
    packed = preference_loss(
        *(padded[kept], labels[kept], rewards),
        ref_logps=reference.sum(-1),
        group_ids=torch.tensor(ids),
        cu_seqlens=torch.tensor([0, *lengths.cumsum(0)], device=device),
        backend=backend,
    )
    expected = preference_loss(padded, labels, rewards, ref_logps=reference.sum(-1), group_ids=ids, backend=backend)
    assert_same(packed, expected)


def test_positions_that_are_not_scored_are_not_read(reduction):
    backend, device = reduction
    _, labels, rewards, reference = make(device)
    logps = (-torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))).to(device)
    unscored = labels == -100
    results = []
    for filling in (0.0, torch.nan, -torch.inf):
        leaf = logps.masked_fill(unscored, filling).requires_grad_()
        output = preference_loss(leaf, labels, rewards, ref_logps=reference, backend=backend)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        assert gradient[unscored].eq(0).all() and gradient[~unscored].ne(0).all()
        results.append((output.loss, gradient))
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_half_precision_log_probabilities_are_summed_in_float32(reduction):
    backend, device = reduction
    _, labels, rewards, _ = make(device, length=200)
    logps = (-torch.rand(labels.shape, generator=torch.Generator().manual_seed(1))).bfloat16().to(device)
    output = preference_loss(logps, labels, rewards, ref_logps=torch.zeros(6, device=device), backend=backend)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.logps, torch.where(labels == -100, 0, logps.double()).sum(-1).float())


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if not o.length_normalize], ids=str)
@pytest.mark.parametrize("layout", ["grouped", "stacked"])
def test_scores_are_log_ratios(reduction, objective, layout):
    backend, device = reduction
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(6, generator=generator).to(device).requires_grad_()
    rewards = torch.randn(6, generator=generator).to(device)
    output = score_loss(scores, rewards, objective=objective, num_responses=2, layout=layout, backend=backend)
    index = torch.tensor([[0, 1], [2, 3], [4, 5]] if layout == "grouped" else [[0, 3], [1, 4], [2, 5]])
    expected = objective(scores.double()[index], rewards.double()[index])
    torch.testing.assert_close(output.group_losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.implicit_rewards, objective.beta * scores.detach())
    assert output.ref_logps is None and torch.equal(output.logps, scores)
    (gradient,) = torch.autograd.grad(output.loss, scores)
    (exact,) = torch.autograd.grad(expected.mean(), scores)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-7)


def test_scores_of_ragged_groups_and_a_function_of_ones_own():
    scores, rewards = torch.randn(5, dtype=torch.float64, requires_grad=True), torch.arange(5)

    def spread(ratios, rewards, present):
        return (ratios * rewards * present).sum(-1)

    output = score_loss(scores, rewards, objective=spread, group_ids=[4, 4, 9, 4, 9])
    expected = torch.stack([scores[1] + 3 * scores[3], 2 * scores[2] + 4 * scores[4]])
    assert output.loss.dtype == torch.float64
    torch.testing.assert_close(output.group_losses, expected)


def test_a_score_has_no_length():
    with pytest.raises(ValueError, match="objective must not be length-normalised"):
        score_loss(torch.randn(4), torch.randn(4), objective=SimPO())
    score_loss(torch.randn(4), torch.randn(4), objective=dataclasses.replace(SimPO(), length_normalize=False))


BAD_LOGPS = {
    "token_logps must be a tensor, got list": dict(token_logps=[[0.0]]),
    "token_logps must be floating point (float32, bfloat16, float16 or float64), got torch.int64": dict(
        token_logps=torch.zeros(6, 5, dtype=torch.int64)
    ),
    "token_logps must have the labels' shape [6, 5]; got [6, 4]": dict(token_logps=torch.zeros(6, 4)),
    "token_logps must be on the labels' device cpu; got meta": dict(token_logps=torch.zeros(6, 5, device="meta")),
    "rewards must be one number for each of the 6 sequences": dict(rewards=torch.zeros(5)),
    "ref_logps must be given": dict(ref_logps=None),
}


@pytest.mark.parametrize("message", BAD_LOGPS)
def test_bad_arguments_of_preference_loss_are_named(message):
    _, labels, rewards, reference = make("cpu")
    arguments = dict(token_logps=torch.zeros(6, 5), labels=labels, rewards=rewards, ref_logps=reference)
    with pytest.raises(ValueError) as error:
        preference_loss(**arguments | BAD_LOGPS[message])
    assert message in str(error.value)


BAD_SCORES = {
    "scores must be a tensor, got list": dict(scores=[0.0, 1.0]),
    "scores must be floating point (float32, bfloat16, float16 or float64), got torch.int64": dict(
        scores=torch.arange(4)
    ),
    "scores must be [B], one number for each of B > 0 responses; got shape [4, 1]": dict(scores=torch.zeros(4, 1)),
    "got shape [0]": dict(scores=torch.zeros(0)),
    "rewards must be one number for each of the 4 sequences": dict(rewards=torch.zeros(5)),
    "rewards must be on the other inputs' device cpu": dict(rewards=torch.zeros(4, device="meta")),
    "num_responses must divide": dict(num_responses=3),
}


@pytest.mark.parametrize("message", BAD_SCORES)
def test_bad_arguments_of_score_loss_are_named(message):
    with pytest.raises(ValueError) as error:
        score_loss(**dict(scores=torch.zeros(4), rewards=torch.zeros(4)) | BAD_SCORES[message])
    assert message in str(error.value)


def test_example_of_a_denoising_model(capsys):
    """Its policy learns to prefer what has the higher reward."""
    state = runpy.run_path(str(EXAMPLES / "denoising_model.py"))
    assert "step 30" in capsys.readouterr().out
    assert state["output"].loss < 0.62 and state["output"].accuracy > 0.6
