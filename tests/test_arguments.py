"""Arguments that do not fit raise a ValueError that names them; odd ones that do fit give the right number."""

import math

import numpy as np
import pytest
import torch

from rpo_kernels import (
    DPO,
    IPO,
    RPO,
    SimPO,
    linear_token_logprobs,
    preference_loss,
    rpo_loss,
    score_loss,
    token_logprobs,
)

LOGITS = torch.randn(4, 5, 9, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(20).reshape(4, 5) % 9
HIDDEN, WEIGHT = LOGITS[..., :6].contiguous(), LOGITS[0, :, :6].contiguous()
REWARDS, REF = torch.tensor([1.0, 0.0, 2.0, 5.0]), -torch.rand(4, generator=torch.Generator().manual_seed(1))


def loss(**changes):
    arguments = dict(logits=LOGITS, labels=LABELS, rewards=REWARDS, ref_logps=REF) | changes
    return rpo_loss(**arguments)


def linear(**changes):
    arguments = dict(hidden=HIDDEN, weight=torch.randn(9, 6), labels=LABELS) | changes
    return linear_token_logprobs(**arguments)


def packed(**changes):
    arguments = dict(logits=LOGITS.flatten(0, 1), labels=LABELS.flatten(), cu_seqlens=torch.tensor([0, 5, 10, 15, 20]))
    return loss(**arguments | changes)


# Triton's interpreter computes in NumPy, which warns where what is masked out is not finite.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*quantize_per_tensor")
QUANTISED = torch.quantize_per_tensor(LOGITS, 0.1, 0, torch.qint8)
NESTED = torch.nested.nested_tensor([LOGITS[0], LOGITS[1]], layout=torch.jagged)
CASES = [
    (loss, dict(logits=LOGITS.tolist()), "logits must be a tensor, got list"),
    (loss, dict(logits=LOGITS.numpy()), "logits must be a tensor, got ndarray"),
    (loss, dict(logits=LOGITS.to_sparse()), "logits must be a dense tensor"),
    (loss, dict(logits=NESTED), "logits must be a dense tensor"),
    (loss, dict(logits=QUANTISED), "logits must be floating point .* got torch.qint8"),
    (loss, dict(logits=LOGITS.to(torch.float8_e4m3fn)), "logits must be floating point .* got torch.float8_e4m3fn"),
    (loss, dict(logits=torch.randn(9), labels=torch.tensor(0)), r"labels must be \[B, T\]"),
    (loss, dict(labels=LABELS.tolist()), "labels must be a tensor, got list"),
    (loss, dict(labels=LABELS.float()), "labels must be int64 or int32"),
    (loss, dict(rewards=[1.0, 0.0, 2.0, 5.0]), "rewards must be a tensor"),
    (loss, dict(rewards=REWARDS.to(torch.complex64)), "rewards must be of real numbers"),
    (loss, dict(ref_logps=REF.tolist()), "ref_logps must be a tensor"),
    (loss, dict(ref_logps=None, ref_logits=LOGITS.tolist()), "ref_logits must be a tensor"),
    (packed, dict(cu_seqlens=[0, 5, 10, 15, 20]), "cu_seqlens must be a tensor"),
    (packed, dict(cu_seqlens=np.array([0, 5, 10, 15, 20])), "cu_seqlens must be a tensor"),
    (loss, dict(token_weights=LABELS.tolist()), "token_weights must be a tensor"),
    (loss, dict(objective=lambda r, w, p: None), "objective must return a floating-point tensor.* got NoneType"),
    (loss, dict(objective=lambda r, w, p: [0.0, 0.0]), "objective must return a floating-point tensor.* got list"),
    (
        loss,
        dict(objective=lambda r, w, p: torch.ones(2, dtype=torch.int64)),
        "objective must return .* got torch.int64",
    ),
    (loss, dict(objective=lambda r, w, p: r), r"objective must return a loss for each of the 2 groups; got \[2, 2\]"),
    (score_loss, dict(scores=torch.tensor(1.0), rewards=REWARDS[:1]), r"scores must be \[B\]"),
    (score_loss, dict(scores=torch.zeros(2, 2), rewards=REWARDS), r"scores must be \[B\]"),
    (loss, dict(num_responses=2.0), "num_responses must be an integer"),
    (loss, dict(num_responses=torch.tensor(2)), "num_responses must be an integer"),
    (loss, dict(group_ids=[[0, 0], [1, 1]]), "group_ids must be a tensor or a sequence of integers"),
    (loss, dict(group_ids=[math.nan] * 4), "group_ids must be a tensor or a sequence of integers"),
    (loss, dict(group_ids=torch.zeros(4)), "group_ids must be one-dimensional integers"),
    (loss, dict(group_ids=3), "group_ids must be a tensor or a sequence of integers"),
    (loss, dict(ignore_index=None), "ignore_index must be an integer"),
    (loss, dict(ignore_index=1.5), "ignore_index must be an integer"),
    (loss, dict(backend=3), "backend must be one of"),
    (loss, dict(temperature="1"), "temperature must be a positive finite number"),
    (loss, dict(temperature=torch.tensor(1.0)), "temperature must be a number, not a tensor"),
    (loss, dict(softcap=torch.tensor(1.0, requires_grad=True)), "softcap must be a number, not a tensor"),
    (loss, dict(logit_scale=math.inf), "logit_scale must be a positive finite number"),
    (linear, dict(weight=torch.nn.Linear(6, 9)), "weight must be a tensor, got Linear"),
    (linear, dict(bias=0.5), "bias must be a tensor, got float"),
    (linear, dict(bias=torch.tensor(0.5)), r"bias must have one number for each row of weight, \[9\]"),
    (linear, dict(hidden=HIDDEN.tolist()), "hidden must be a tensor"),
    (linear, dict(labels=LABELS.tolist()), "labels must be a tensor"),
    (linear, dict(memory_budget=-1), "memory_budget must be"),
    (linear, dict(backend=3), "backend must be one of"),
]


@pytest.mark.parametrize(("function", "changes", "message"), CASES, ids=[f"{f.__name__}-{m}" for f, _, m in CASES])
def test_what_does_not_fit_is_named(function, changes, message):
    with pytest.raises(ValueError, match=message):
        function(**changes)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RPO(beta="x"),
        lambda: RPO(eta=None),
        lambda: RPO(gamma="1"),
        lambda: IPO("x"),
        lambda: SimPO(gamma=math.nan),
        lambda: RPO(beta=torch.ones(2)),
        lambda: DPO(beta=-1),
    ],
)
def test_objectives_name_what_does_not_fit(make):
    with pytest.raises(ValueError, match="must be"):
        make()


def test_a_budget_beyond_any_memory_is_unlimited():
    torch.testing.assert_close(
        linear(weight=WEIGHT.new_ones(9, 6), memory_budget=10**30),
        linear(weight=WEIGHT.new_ones(9, 6), memory_budget=2**30),
    )


@pytest.mark.parametrize("ids", [[7, 3, 3, 7], np.array([7, 3, 3, 7]), list(torch.tensor([7, 3, 3, 7]))], ids=type)
def test_group_ids_are_compared_by_value(ids):
    expected = loss(group_ids=torch.tensor([7, 3, 3, 7]))
    assert expected.loss > 0 and torch.equal(loss(group_ids=ids).loss, expected.loss)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_of_unscored_tokens_are_not_read(bad, backend, backend_device):
    labels, weights = LABELS.clone(), torch.rand(4, 5)
    labels[:, 2] = -100
    expected = None
    for value in (0.5, bad):
        weights[:, 2] = value
        logits = LOGITS.to(backend_device, copy=True).requires_grad_()
        arguments = [x.to(backend_device) for x in (labels, REWARDS, REF, weights)]
        out = rpo_loss(logits, *arguments[:2], ref_logps=arguments[2], token_weights=arguments[3], backend=backend)
        results = [out.loss, out.logps, *torch.autograd.grad(out.loss, logits)]
        expected = expected or results
        assert all(map(torch.equal, results, expected))


def test_as_many_packed_tokens_as_sequences_leave_ref_logps_ambiguous():
    offsets = torch.tensor([0, 2, 2, 3, 4])
    arguments = dict(logits=LOGITS[:, 0], labels=LABELS[:, 0], cu_seqlens=offsets)
    with pytest.raises(ValueError, match=r"ref_logps of shape .* could be sums or per token"):
        loss(**arguments)
    per_token = token_logprobs(LOGITS[:, 1], LABELS[:, 0])
    expected = torch.stack([per_token[0] + per_token[1], per_token[2] * 0, per_token[2], per_token[3]])
    for backend in ("torch", "triton"):
        out = loss(**arguments, ref_logps=None, ref_logits=LOGITS[:, 1], backend=backend)
        torch.testing.assert_close(out.ref_logps, expected)


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_rewards_keep_their_digits(backend_name, available_backend):
    backend, device = available_backend(backend_name)
    logits, labels, ref = (x.to(device) for x in (LOGITS, LABELS, REF))
    options = dict(ref_logps=ref, backend=backend, objective=DPO())

    def of(rewards):
        return rpo_loss(logits, labels, rewards.to(device), **options)

    expected = of(torch.tensor([1.0, 0.0, 0.0, 1.0]))
    for rewards in (
        torch.tensor([2**24 + 1, 2**24, 2**40, 2**40 + 1]),
        torch.tensor([1 + 1e-12, 1.0, -1.0, -1 + 1e-12], dtype=torch.float64),
        torch.tensor([1e39, -1e39, 1e300, 2e300], dtype=torch.float64),
    ):
        out = of(rewards)
        assert torch.equal(out.loss, expected.loss) and torch.equal(out.accuracy, expected.accuracy)
    options["objective"] = RPO()
    torch.testing.assert_close(
        of(torch.tensor([1e10 + 3, 1e10, 0, 1], dtype=torch.float64)).loss, of(torch.tensor([3.0, 0, 0, 1])).loss
    )


@pytest.mark.parametrize("backend_name", ["torch", "triton"])
def test_gradients_of_rewards_and_constants(backend_name, available_backend):
    backend, device = available_backend(backend_name)
    logps = -5 * torch.rand(4, 5, dtype=torch.float64)
    beta, eta, rewards = (torch.tensor(0.3), torch.tensor(0.7), REWARDS.clone())
    inputs = [x.double().to(device).requires_grad_() for x in (beta, eta, rewards)]

    def of(beta, eta, rewards, dtype=torch.float64):
        objective = RPO(beta=beta, eta=eta)
        ref = REF.to(device, dtype)
        return preference_loss(
            logps.to(device, dtype), LABELS.to(device), rewards, ref_logps=ref, objective=objective, backend=backend
        ).loss

    torch.autograd.gradcheck(of, inputs)
    expected = torch.autograd.grad(of(*inputs), inputs)
    single = [x.detach().float().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(of(*single, dtype=torch.float32), single)
    for grad, exact in zip(grads, expected):
        torch.testing.assert_close(grad.double(), exact, rtol=1e-4, atol=1e-6)


def test_accuracy_of_large_groups_takes_little_memory():
    """100 groups of one and one of 200: all pairs of [G, K, K] would be 4 million."""
    count = 300
    ids = [0] * 200 + list(range(1, 101))
    scores = torch.randn(count, generator=torch.Generator().manual_seed(0))
    rewards = torch.randn(count, generator=torch.Generator().manual_seed(1))
    with LargestTensor() as largest:
        out = score_loss(scores, rewards, objective=RPO(), group_ids=ids)
    assert largest.numel < 2**21
    a, r = scores[:200], rewards[:200]
    pairs = r[:, None] > r[None]
    torch.testing.assert_close(out.accuracy, ((a[:, None] > a[None]) & pairs).sum() / pairs.sum())


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the size of the largest tensor that an operator returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            self.numel = max(self.numel, x.numel() if torch.is_tensor(x) else 0)
        return result


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_offsets_are_checked(compiler):
    torch._dynamo.reset()
    step = torch.compile(lambda offsets: packed(cu_seqlens=offsets).loss, backend=compiler)
    torch.testing.assert_close(step(torch.tensor([0, 5, 10, 15, 20])), packed().loss)
    for bad in ([0, 5, 3, 15, 20], [0, 5, 10, 15, 10**9], [-(10**9), 5, 10, 15, 20]):
        with pytest.raises(RuntimeError, match="cu_seqlens must rise from 0 to the 20 tokens"):
            step(torch.tensor(bad))


def test_compiled_with_options_that_change():
    torch._dynamo.reset()
    step = torch.compile(
        lambda logits, temperature: token_logprobs(logits, LABELS[: len(logits)], temperature=temperature),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for count, temperature in [(4, 1.0), (3, 0.7), (2, 0.3)]:
        logits = LOGITS[:count]
        torch.testing.assert_close(
            step(logits, temperature), token_logprobs(logits, LABELS[:count], temperature=temperature)
        )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_logits_of_any_strides(backend, backend_device, compiler):
    labels, factors = LABELS.to(backend_device), torch.rand(4, 5).to(backend_device)
    for order in ((1, 0, 2), (2, 0, 1), (2, 1, 0)):
        logits = LOGITS.to(backend_device).permute(order).contiguous().permute(*(order.index(i) for i in range(3)))
        logits.requires_grad_()

        def grad(logits):
            return torch.autograd.grad(token_logprobs(logits * 1, labels, backend=backend), logits, factors)[0]

        torch._dynamo.reset()
        compiled = torch.compile(lambda x: token_logprobs(x * 1, labels, backend=backend), backend=compiler)
        (result,) = torch.autograd.grad(compiled(logits), logits, factors)
        torch.testing.assert_close(result, grad(logits))


def test_forward_mode_is_refused():
    """The dispatcher would drop the tangents, and their result be 0."""
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: token_logprobs(x, LABELS), (LOGITS,), (LOGITS,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: linear(hidden=x), (HIDDEN,), (HIDDEN,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        token_logprobs(torch.autograd.forward_ad.make_dual(LOGITS.clone(), LOGITS), LABELS)
