"""rpo_loss: layouts, references, weights and the fused objective, against sums written out by hand."""

import math

import pytest
import torch

import reference
from rpo_kernels import CDPO, DPO, IPO, RPO, SimPO, rpo_loss
from rpo_kernels.objectives import ranking_metrics

OBJECTIVES = {
    "bwd_kl": RPO("bwd_kl", beta=0.3, eta=1.3),
    "fwd_kl": RPO("fwd_kl", beta=0.3, eta=1.3),
    "sq": RPO("sq", beta=0.3, eta=1.3),
    "normalized": RPO("sq", beta=2.0, length_normalize=True),
    "dpo": DPO(),
    "cdpo": CDPO(),
    "ipo": IPO(),
    "simpo": SimPO(),
}


def make(groups=3, size=2, length=4, vocab=67, device="cpu", dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = groups * size
    logits = (2 * torch.randn(count, length, vocab, generator=generator)).to(dtype).to(device).requires_grad_()
    labels = torch.randint(vocab, (count, length), generator=generator)
    labels[:, 0] = -100
    labels[0, 1:3] = -100
    rewards = torch.randn(count, generator=generator)
    ref = -4 * torch.rand(count, length, generator=generator)
    return logits, labels.to(device), rewards.to(device), ref.to(device)


def by_hand(logits, labels, rewards, ref, objective, index, token_weights=None, lengths=None, **options):
    """loss, group losses, sums, implicit rewards; `index` lists each group's sequences."""
    scored = labels != -100
    weights = scored.double() * (1 if token_weights is None else token_weights)
    logps = reference.sequence_sums(reference.token_logprobs(logits, labels, **options) * weights, lengths)
    ratios = logps
    if not objective.reference_free:
        ratios = logps - reference.sequence_sums(ref.double() * weights, lengths)
    if objective.length_normalize:
        ratios = ratios / reference.sequence_sums(scored.double(), lengths).clamp(min=1)
    losses = torch.cat(
        [objective(ratios[members].unsqueeze(0), rewards[members].double().unsqueeze(0)) for members in index]
    )
    return losses.mean(), losses, logps, objective.beta * ratios


def check(out, expected, logits, rewards, index, tolerance=2e-5):
    loss, losses, logps, implicit = expected
    torch.testing.assert_close(out.loss.double(), loss, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.group_losses.double(), losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.logps.double(), logps, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.implicit_rewards.double(), implicit, rtol=tolerance, atol=tolerance)
    widest = max(map(len, index))
    padded = torch.tensor([[*members, *[-1] * (widest - len(members))] for members in index], device=rewards.device)
    present = padded >= 0
    accuracy, margin = ranking_metrics(implicit.detach()[padded], rewards[padded].double(), present)
    torch.testing.assert_close(out.accuracy.double(), accuracy, equal_nan=True)
    torch.testing.assert_close(out.margin.double(), margin, rtol=tolerance, atol=tolerance, equal_nan=True)
    (grad,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    (exact,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert (grad - exact).norm() <= tolerance * exact.norm() + 1e-12


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("layout", ["grouped", "stacked"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_padded(backend, backend_device, name, layout, size):
    objective = OBJECTIVES[name]
    logits, labels, rewards, ref = make(3, size, device=backend_device)
    index = [[g * size + k if layout == "grouped" else k * 3 + g for k in range(size)] for g in range(3)]
    out = rpo_loss(
        logits,
        labels,
        rewards,
        ref_logps=None if objective.reference_free else ref,
        objective=objective,
        num_responses=size,
        layout=layout,
        backend=backend,
    )
    check(out, by_hand(logits, labels, rewards, ref, objective, index), logits, rewards, index)
    assert (out.ref_logps is None) == objective.reference_free


@pytest.mark.parametrize("name", ["bwd_kl", "fwd_kl", "sq", "simpo"])
def test_ragged_groups(backend, backend_device, name):
    objective = OBJECTIVES[name]
    logits, labels, rewards, ref = make(4, 2, device=backend_device)
    ids = [7, 3, 3, 7, 5, 3, 7, 3]
    index = [[0, 3, 6], [1, 2, 5, 7], [4]]
    for group_ids in (ids, torch.tensor(ids)):
        out = rpo_loss(
            logits,
            labels,
            rewards,
            ref_logps=None if objective.reference_free else ref,
            objective=objective,
            group_ids=group_ids,
            backend=backend,
        )
        check(out, by_hand(logits, labels, rewards, ref, objective, index), logits, rewards, index)


@pytest.mark.parametrize("offsets_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("name", ["bwd_kl", "sq", "normalized"])
def test_packed(backend, backend_device, name, shift, offsets_dtype):
    objective = OBJECTIVES[name]
    lengths = [5, 0, 3, 9, 1, 2, 4, 0]
    logits, labels, rewards, ref = make(4, 2, length=3, device=backend_device)
    logits = logits.flatten(0, 1).detach().requires_grad_()  # [24, V]
    labels = torch.randint(67, (24,), generator=torch.Generator().manual_seed(3)).to(backend_device)
    labels[7] = -100
    ref = ref.flatten()
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=offsets_dtype, device=backend_device)
    index = [[0, 1], [2, 3], [4, 5], [6, 7]]
    masked = labels.clone()
    if shift:
        masked[[0, 5, 8, 17, 18, 20]] = -100
    out = rpo_loss(
        logits,
        labels,
        rewards,
        ref_logps=ref,
        objective=objective,
        cu_seqlens=offsets,
        shift=shift,
        backend=backend,
    )
    expected = by_hand(logits, masked, rewards, ref, objective, index, lengths=lengths, shift=shift)
    check(out, expected, logits, rewards, index)


@pytest.mark.parametrize("reference_form", ["tokens", "sums", "logits"])
def test_reference_forms(backend, backend_device, reference_form):
    logits, labels, rewards, _ = make(3, 2, device=backend_device)
    ref_logits = make(3, 2, device=backend_device, seed=5)[0]
    token_weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(4)).to(backend_device)
    options = dict(temperature=0.8, softcap=9.0, logit_scale=0.7, shift=True)
    ref = reference.token_logprobs(ref_logits, labels, **options).detach()
    forms = {
        "tokens": dict(ref_logps=ref.float()),
        "sums": dict(ref_logps=(ref * token_weights).sum(-1).float()),
        "logits": dict(ref_logits=ref_logits),
    }
    index = [[0, 1], [2, 3], [4, 5]]
    objective = RPO(beta=0.4)
    out = rpo_loss(
        logits,
        labels,
        rewards,
        objective=objective,
        token_weights=token_weights,
        backend=backend,
        **options,
        **forms[reference_form],
    )
    expected = by_hand(logits, labels, rewards, ref, objective, index, token_weights=token_weights, **options)
    check(out, expected, logits, rewards, index)
    torch.testing.assert_close(out.ref_logps.double(), (ref * token_weights).sum(-1), rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(out.loss, ref_logits, allow_unused=True)[0] is None


def test_unscored_reference_tokens_do_not_count(backend, backend_device):
    logits, labels, rewards, ref = make(device=backend_device)
    poisoned = ref.masked_fill(labels == -100, torch.nan)
    a, b = (rpo_loss(logits, labels, rewards, ref_logps=x, backend=backend) for x in (ref, poisoned))
    assert torch.equal(a.loss, b.loss)


def test_sequence_without_scored_tokens_contributes_nothing(backend, backend_device):
    logits, labels, rewards, ref = make(device=backend_device)
    labels[0] = -100
    for objective in (RPO(), RPO(length_normalize=True)):
        out = rpo_loss(logits, labels, rewards, ref_logps=ref, objective=objective, backend=backend)
        assert out.logps[0] == 0 and out.implicit_rewards[0] == 0 and out.loss.isfinite()
        (grad,) = torch.autograd.grad(out.loss, logits)
        assert grad[0].eq(0).all() and grad.isfinite().all()


def test_every_differentiable_output(backend, backend_device):
    """Gradients through group_losses and logps, alone and together with the loss."""
    logits, labels, rewards, ref = make(device=backend_device)
    index = [[0, 1], [2, 3], [4, 5]]
    objective = RPO(beta=0.5)
    group_weight = torch.tensor([1.0, -2.0, 0.5], device=backend_device)
    logp_weight = torch.linspace(-1, 1, 6, device=backend_device)

    def mix(loss, group_losses, logps):
        return 3 * loss + (group_losses * group_weight).sum() + (logps * logp_weight).sum()

    loss, losses, logps, _ = by_hand(logits, labels, rewards, ref, objective, index)
    (exact,) = torch.autograd.grad(mix(loss, losses, logps), logits)
    out = rpo_loss(logits, labels, rewards, ref_logps=ref, objective=objective, backend=backend)
    (grad,) = torch.autograd.grad(mix(out.loss, out.group_losses, out.logps), logits)
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5)
    out = rpo_loss(logits, labels, rewards, ref_logps=ref, objective=objective, backend=backend)
    (grad,) = torch.autograd.grad((out.logps * logp_weight).sum(), logits)
    (exact,) = torch.autograd.grad(
        (by_hand(logits, labels, rewards, ref, objective, index)[2] * logp_weight).sum(), logits
    )
    torch.testing.assert_close(grad, exact, rtol=1e-4, atol=1e-5)


def test_users_own_objective(backend, backend_device):
    logits, labels, rewards, ref = make(device=backend_device)

    def hinge(log_ratios, rewards, present):
        """SLiC-like: the better response must lead by one."""
        assert present is None
        order = rewards.argsort(-1, descending=True)
        lead = log_ratios.gather(-1, order)
        return (1 - (lead[:, 0] - lead[:, 1])).clamp(min=0)

    out = rpo_loss(logits, labels, rewards, ref_logps=ref, objective=hinge, backend=backend)
    hinge.beta, hinge.reference_free, hinge.length_normalize = 1.0, False, False
    with_none = lambda ratios, rewards: hinge(ratios, rewards, None)  # noqa: E731
    with_none.beta, with_none.reference_free, with_none.length_normalize = 1.0, False, False
    index = [[0, 1], [2, 3], [4, 5]]
    check(out, by_hand(logits, labels, rewards, ref, with_none, index), logits, rewards, index)


def test_a_subclass_with_its_own_formula_is_the_users_own(backend, backend_device):
    class Doubled(RPO):
        def __call__(self, log_ratios, rewards, present=None):
            return 2 * super().__call__(log_ratios, rewards, present)

    logits, labels, rewards, ref = make(device=backend_device)
    plain = rpo_loss(logits, labels, rewards, ref_logps=ref, objective=RPO("sq"), backend=backend)
    doubled = rpo_loss(logits, labels, rewards, ref_logps=ref, objective=Doubled("sq"), backend=backend)
    torch.testing.assert_close(doubled.group_losses, 2 * plain.group_losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_token_weights_of_any_type(backend, backend_device, dtype):
    logits, labels, rewards, ref = make(device=backend_device)
    weights = torch.arange(labels.numel(), device=backend_device).reshape(labels.shape) % 3
    results = []
    for kind in (torch.float32, dtype):
        out = rpo_loss(logits, labels, rewards, ref_logps=ref, token_weights=weights.to(kind), backend=backend)
        results.append([out.loss, out.logps, *torch.autograd.grad(out.loss, logits)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_builtin_objective_as_a_callable_gives_the_same(backend, backend_device):
    """The fused kernel against torch: an RPO wrapped in a function is not fused."""
    logits, labels, rewards, ref = make(4, 3, device=backend_device)
    for name in ("bwd_kl", "fwd_kl", "sq"):
        objective = OBJECTIVES[name]

        def wrapped(ratios, rewards, present, objective=objective):
            return objective(ratios, rewards, present)

        wrapped.beta = objective.beta
        arguments = dict(ref_logps=ref, num_responses=3, backend=backend)
        a = rpo_loss(logits, labels, rewards, objective=objective, **arguments)
        b = rpo_loss(logits, labels, rewards, objective=wrapped, **arguments)
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_same_input_same_bits(backend, backend_device):
    logits, labels, rewards, ref = make(2, 3, length=9, device=backend_device, dtype=torch.bfloat16)
    results = []
    for _ in range(2):
        out = rpo_loss(logits, labels, rewards, ref_logps=ref, num_responses=3, backend=backend)
        results.append((out.loss, torch.autograd.grad(out.loss, logits)[0]))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_inplace_backward(backend, backend_device):
    logits, labels, rewards, ref = make(device=backend_device)
    (expected,) = torch.autograd.grad(rpo_loss(logits, labels, rewards, ref_logps=ref, backend=backend).loss, logits)
    owned = (logits * 1).detach().requires_grad_()
    source = owned * 1
    out = rpo_loss(source, labels, rewards, ref_logps=ref, backend=backend, inplace_backward=True)
    (grad,) = torch.autograd.grad(out.loss, source)
    assert torch.equal(grad, expected) and grad.data_ptr() == source.data_ptr()


BAD = {
    "labels must be [B, T]": lambda a: a.update(labels=a["labels"].flatten(), logits=a["logits"].flatten(0, 1)),
    "rewards must be one number": lambda a: a.update(rewards=a["rewards"][:-1]),
    "rewards must be finite": lambda a: a["rewards"].__setitem__(1, math.inf),
    "num_responses must divide": lambda a: a.update(num_responses=4),
    "layout must be one of": lambda a: a.update(layout="zigzag"),
    "group_ids must have one id": lambda a: a.update(group_ids=[0, 1]),
    "group_ids must be one-dimensional": lambda a: a.update(group_ids=torch.zeros(6, 1, dtype=torch.int64)),
    "token_weights must have": lambda a: a.update(token_weights=torch.ones(6)),
    "token_weights must be on": lambda a: a.update(token_weights=torch.ones(a["labels"].shape, device="meta")),
    "ref_logits must be": lambda a: a.update(ref_logps=None, ref_logits=a["logits"][..., :-1]),
    "ref_logps must be given": lambda a: a.update(ref_logps=None),
    "ref_logps must be sums": lambda a: a.update(ref_logps=torch.zeros(6, 6)),
    "ref_logps or ref_logits": lambda a: a.update(ref_logits=a["logits"]),
    "reference-free": lambda a: a.update(objective=SimPO()),
    "objective must be": lambda a: a.update(objective="dpo"),
    "objective must be an RPO or": lambda a: a.update(objective=torch.nn.Identity),
    "objective must be an RPO, such as RPO()": lambda a: a.update(objective=RPO),
    "objective must be an RPO, such as IPO()": lambda a: a.update(objective=IPO),
    "objective must return a loss for each": lambda a: a.update(objective=lambda ratios, rewards, _: ratios.sum()),
    "rewards must be a tensor, got list": lambda a: a.update(rewards=a["rewards"].tolist()),
    "ref_logps must be a tensor, got list": lambda a: a.update(ref_logps=a["ref_logps"].tolist()),
    "token_weights must be a tensor, got list": lambda a: a.update(token_weights=[1.0]),
    "where cu_seqlens is given": lambda a: a.update(cu_seqlens=torch.tensor([0, 7])),
    "labels must hold at least one": lambda a: a.update(
        logits=a["logits"][:0], labels=a["labels"][:0], rewards=a["rewards"][:0], ref_logps=None
    ),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_named(message):
    logits, labels, rewards, ref = make()
    arguments = dict(logits=logits, labels=labels, rewards=rewards, ref_logps=ref)
    BAD[message](arguments)
    with pytest.raises(ValueError) as error:
        rpo_loss(**arguments)
    assert message in str(error.value)


@pytest.mark.parametrize("offsets", [[0, 5, 3, 21, 24, 24, 24], [1, 2, 3, 4, 5, 6, 24], [0, 1, 2, 3, 4, 5, 6]], ids=str)
def test_bad_offsets_are_named(offsets):
    logits, labels, rewards, ref = make()
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to the 24 tokens"):
        rpo_loss(
            logits.flatten(0, 1),
            labels.flatten(),
            rewards,
            ref_logps=ref.flatten(),
            cu_seqlens=torch.tensor(offsets),
        )
    for bad in (torch.tensor([[0, 24]]), torch.tensor([0.0, 24.0])):
        with pytest.raises(ValueError, match=r"cu_seqlens must be (int64 or int32|.B)"):
            rpo_loss(logits.flatten(0, 1), labels.flatten(), rewards, cu_seqlens=bad)
