"""`outputs=` of token_logprobs and linear_token_logprobs against float64, and what a call without any returns."""

import pytest
import torch

import reference
from rpo_kernels import TokenOutputs, linear_token_logprobs, token_logprobs
from rpo_kernels.head import gemm, plan

# Triton's interpreter computes in NumPy, which warns where exponentials overflow as intended.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
OPTIONS = [
    dict(),
    dict(shift=True),
    dict(temperature=0.7, logit_scale=0.6),
    dict(temperature=1.3, softcap=7.0, logit_scale=2.0, shift=True),
]


def make(shape=(2, 5), vocab=301, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(*shape, vocab, generator=generator)).to(dtype)
    labels = torch.randint(vocab, shape, generator=generator)
    labels[0, 3] = -100
    labels[:, 2] = logits[:, 1].argmax(-1)  # with `shift` the label is the most likely one
    labels[:, 1] = logits[:, 1].argmax(-1)  # and without
    return logits.to(device).requires_grad_(), labels.to(device)


def expected(logits, labels, temperature=1.0, softcap=None, logit_scale=1.0, shift=False):
    """All outputs in float64, the first two differentiable."""
    z = reference.transform(logits, temperature, softcap, logit_scale)
    first = int(shift)
    z = z[:, : labels.shape[1] - first]
    target = labels[:, first:]
    scored = target != -100
    target = target.masked_fill(~scored, 0)
    all_logps = z.log_softmax(-1)
    values = dict(
        logps=all_logps.gather(-1, target.unsqueeze(-1)).squeeze(-1),
        entropy=-(all_logps.exp() * all_logps).sum(-1),
        mean_logit=z.mean(-1),
        is_top1=(z.argmax(-1) == target).double(),
        log_sum_sq_probs=(2 * all_logps).logsumexp(-1),
    )
    return {k: torch.nn.functional.pad(v.masked_fill(~scored, 0), (first, 0)) for k, v in values.items()}


def slopes(labels):
    generator = torch.Generator().manual_seed(7)
    return [(torch.rand(labels.shape, generator=generator) - 0.3).to(labels.device) for _ in range(2)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_values_and_gradients(backend, backend_device, dtype, options):
    logits, labels = make(dtype=dtype, device=backend_device)
    exact = expected(logits, labels, **options)
    out = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend, **options)
    assert isinstance(out, TokenOutputs) and out.dropped is None
    assert out.is_top1.sum() >= 2
    for name, value in exact.items():
        found = getattr(out, name)
        assert found.dtype == torch.float32 and found.shape == labels.shape
        assert found.requires_grad == (name in ("logps", "entropy"))
        torch.testing.assert_close(found.double(), value, rtol=3e-6, atol=5e-6, msg=lambda m, n=name: f"{n}: {m}")
    c, e = slopes(labels)
    (grad,) = torch.autograd.grad((out.logps * c).sum() + (out.entropy * e).sum(), logits)
    (exact_grad,) = torch.autograd.grad((exact["logps"] * c).sum() + (exact["entropy"] * e).sum(), logits)
    # Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds.
    tolerance = 3e-6 if dtype == torch.float32 else 8e-3 if backend == "triton" else 4e-3
    assert (grad.double() - exact_grad.double()).norm() <= tolerance * exact_grad.double().norm()


@pytest.mark.parametrize("asked", [("entropy",), ("is_top1", "mean_logit"), ("log_sum_sq_probs", "entropy")], ids=str)
def test_only_what_is_asked_for_comes(backend, backend_device, asked):
    logits, labels = make(device=backend_device)
    everything = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend)
    out = token_logprobs(logits, labels, outputs=asked, backend=backend)
    for name in TokenOutputs._fields:
        value = getattr(out, name)
        if name in ("logps", *asked):
            assert torch.equal(value, getattr(everything, name)), name
        else:
            assert value is None, name


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_gradient_of_the_entropy_alone(backend, backend_device, inplace_backward):
    leaf, labels = make(device=backend_device)
    exact = expected(leaf, labels)["entropy"].sum()
    (exact_grad,) = torch.autograd.grad(exact, leaf)
    logits = leaf * 1
    out = token_logprobs(logits, labels, outputs=["entropy"], inplace_backward=inplace_backward, backend=backend)
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    torch.testing.assert_close(grad.double(), exact_grad.double(), rtol=1e-4, atol=1e-6)
    assert (grad.data_ptr() == logits.data_ptr()) == inplace_backward


def test_entropy_that_is_only_logged_changes_no_bit_of_the_gradient(backend, backend_device):
    logits, labels = make(device=backend_device)
    (plain,) = torch.autograd.grad(token_logprobs(logits, labels, backend=backend).sum(), logits)
    out = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend)
    assert torch.equal(torch.autograd.grad(out.logps.sum(), logits)[0], plain)


@pytest.mark.parametrize("shape", [(5,), (0,), (0, 3), (2, 2, 3)], ids=str)
def test_shapes(backend, backend_device, shape):
    logits = torch.randn(*shape, 40, device=backend_device, requires_grad=True)
    labels = torch.randint(40, shape, device=backend_device)
    out = token_logprobs(logits, labels, outputs=(*STATISTICS, "dropped"), backend=backend)
    assert all(value.shape == shape for value in out)
    assert out.dropped.eq(0).all()  # nothing is ever left out of logits that are there
    (out.logps.sum() + out.entropy.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_float64_and_gradcheck():
    logits, labels = make((2, 4), vocab=7, dtype=torch.float64)
    for options in OPTIONS:
        out = token_logprobs(logits, labels, outputs=STATISTICS, **options)
        for name, value in expected(logits, labels, **options).items():
            torch.testing.assert_close(getattr(out, name), value, rtol=0, atol=1e-12)
        torch.autograd.gradcheck(lambda x, o=options: token_logprobs(x, labels, outputs=["entropy"], **o)[:2], logits)


def test_masked_vocabulary_and_certain_rows(backend, backend_device):
    """-inf logits weigh nothing in entropy and its gradient; a certain row has entropy 0 and a finite gradient."""
    logits = torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0))
    logits[0, :, 10:] = -torch.inf
    logits[0, 1, 3] = 1e4
    logits, labels = logits.to(backend_device).requires_grad_(), torch.tensor([[3, 3, 20]], device=backend_device)
    out = token_logprobs(logits, labels, outputs=STATISTICS, backend=backend)
    p = logits.detach().double().softmax(-1)
    exact = -torch.xlogy(p, p).sum(-1)
    torch.testing.assert_close(out.entropy.double(), exact, rtol=1e-6, atol=1e-6)
    assert out.is_top1[0, 1:].tolist() == [1, 0] and out.logps[0, 2] == -torch.inf
    (grad,) = torch.autograd.grad(out.entropy.sum(), logits)
    exact_grad = -p * (torch.where(p > 0, p.log(), 0) + exact.unsqueeze(-1))
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("outputs", ["entropy", ("entropy", "perplexity"), ("logps",)])
def test_unknown_outputs_are_named(outputs):
    logits, labels = make()
    with pytest.raises(ValueError, match=r"outputs must be a tuple of names among .*, got .*(entropy|logps)"):
        token_logprobs(logits, labels, outputs=outputs)


def test_compiled_without_graph_breaks():
    logits, labels = make(vocab=64)
    logits = logits.detach()

    def loss(x):
        out = token_logprobs(x, labels, outputs=("entropy", "is_top1"))
        return out.logps.sum() - 0.1 * out.entropy.sum() + out.is_top1.sum()

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


# The head.


def make_head(shape=(2, 7), width=24, vocab=700, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (2 * torch.randn(*shape, width, generator=generator)).to(dtype)
    weight = (torch.randn(vocab, width, generator=generator) * width**-0.5 * 2).to(dtype)
    labels = torch.randint(vocab, shape, generator=generator)
    likely = (hidden.double() @ weight.double().T).argmax(-1)
    labels[:, 1::3] = likely[:, 1::3]
    labels[0, 4] = -100
    leaves = [x.to(device).requires_grad_() for x in (hidden, weight)]
    return *leaves, labels.to(device)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several chunks and tiles of small inputs."""
    monkeypatch.setattr(plan, "_SHAPES", {"cpu": ((8, 256), (8, 256))})
    monkeypatch.setattr(plan, "_ACCELERATOR_SHAPES", ((8, 256), (8, 256)))


@pytest.fixture
def products(monkeypatch):
    """Multiply-adds of all products, as a list that grows."""
    counted = []

    def counting(own):
        def product(*tensors):
            left, right = tensors[-2:] if own is gemm.add_matmul else tensors[:2]
            counted.append(left.shape[0] * left.shape[1] * right.shape[1])
            return own(*tensors)

        return product

    for name in ("matmul", "add_matmul"):
        monkeypatch.setattr(gemm, name, counting(getattr(gemm, name)))
    return counted


@pytest.mark.parametrize(
    ("options", "budget"), [(OPTIONS[0], "1MB"), (OPTIONS[2], "200KB"), (OPTIONS[3], "1MB")], ids=str
)
def test_head_values_and_gradients(backend, backend_device, small_tiles, budget, options):
    hidden, weight, labels = make_head(device=backend_device)
    exact = expected(hidden.double() @ weight.double().T, labels, **options)
    out = linear_token_logprobs(
        hidden, weight, labels, outputs=STATISTICS, memory_budget=budget, backend=backend, **options
    )
    assert isinstance(out, TokenOutputs) and out.dropped is None
    for name, value in exact.items():
        found = getattr(out, name)
        assert found.dtype == torch.float32 and found.requires_grad == (name in ("logps", "entropy"))
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    c, e = slopes(labels)
    mixes = [(c, e), (c * 0, e), (1e-6 * c, 1e6 * e), (c, e * 0)]
    for of_logps, of_entropy in mixes[:1] if backend == "triton" else mixes:
        found, wanted = (
            torch.autograd.grad(
                (o["logps"] * of_logps).sum() + (o["entropy"] * of_entropy).sum(), (hidden, weight), retain_graph=True
            )
            for o in (out._asdict(), exact)
        )
        for a, b in zip(found, wanted):
            assert (a.double() - b.double()).norm() <= 1e-5 * b.double().norm()


@pytest.mark.parametrize("gradient_filter", [None, 2**-9])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_head_outputs_do_not_change_values_or_gradients(
    backend, backend_device, small_tiles, gradient_filter, entropy_grad
):
    if backend == "triton" and backend_device == "cpu" and gradient_filter is not None:
        pytest.skip("Triton's interpreter is slow, and the filter has tests of its own")
    hidden, weight, labels = make_head(device=backend_device)
    options = dict(gradient_filter=gradient_filter, memory_budget="1MB", backend=backend)
    plain = linear_token_logprobs(hidden, weight, labels, **options)
    out = linear_token_logprobs(
        hidden, weight, labels, outputs=(*STATISTICS, "dropped"), entropy_grad=entropy_grad, **options
    )
    assert out.entropy.requires_grad == entropy_grad
    assert (out.dropped > 0).any() == (gradient_filter is not None)
    torch.testing.assert_close(out.logps, plain, rtol=0, atol=0 if not entropy_grad else 4e-6)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (out.logps, plain)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_entropy_with_a_filter_is_off_by_little(backend, backend_device, small_tiles):
    """The columns left out weigh at most their share of p |log p + entropy|."""
    hidden, weight, labels = make_head((2, 9), vocab=1500, device=backend_device)
    exact = expected(hidden.double() @ weight.double().T, labels)["entropy"].sum()
    out = linear_token_logprobs(
        hidden, weight, labels, outputs=["entropy", "dropped"], gradient_filter=2**-13, backend=backend
    )
    assert (out.dropped > 0).any()
    found, wanted = (torch.autograd.grad(x, (hidden, weight)) for x in (out.entropy.sum(), exact))
    for a, b in zip(found, wanted):
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert 1e-6 < error < 0.02


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("outputs", "entropy_grad", "more"), [((), True, 0), (STATISTICS, False, 0), (["entropy"], True, 1)]
)
def test_head_gemms(backend, backend_device, small_tiles, products, frozen, outputs, entropy_grad, more):
    hidden, weight, labels = make_head(shape=(1, 16), width=16, vocab=512, device=backend_device)
    labels[labels == -100] = 5
    weight.requires_grad_(not frozen)
    out = linear_token_logprobs(
        hidden, weight, labels, outputs=outputs, entropy_grad=entropy_grad, memory_budget="100MB", backend=backend
    )
    loss = out.logps.sum() + out.entropy.sum() * entropy_grad if outputs else out.sum()
    loss.backward()
    assert sum(products) == (3 - frozen + more) * 16 * 16 * 512


def test_without_gradients_nothing_is_kept(backend, backend_device, small_tiles, products):
    hidden, weight, labels = make_head(device=backend_device)
    with torch.no_grad():
        out = linear_token_logprobs(hidden, weight, labels, outputs=STATISTICS, backend=backend)
    assert not out.entropy.requires_grad
    assert sum(products) == int((labels != -100).sum()) * weight.numel()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_head_in_half_precision(backend, backend_device, small_tiles, dtype):
    hidden, weight, labels = make_head(dtype=dtype, device=backend_device)
    exact = expected(hidden.double() @ weight.double().T, labels)
    out = linear_token_logprobs(hidden, weight, labels, outputs=STATISTICS, backend=backend)
    assert out.entropy.dtype == torch.float32
    c, e = slopes(labels)
    found, wanted = (
        torch.autograd.grad(
            (o["logps"] * c).sum() + (o["entropy"] * 1e-7 * e).sum(), (hidden, weight), retain_graph=True
        )
        for o in (out._asdict(), exact)
    )
    for a, b in zip(found, wanted):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()
    found, wanted = (
        torch.autograd.grad((1e-7 * o["entropy"] * e).sum() * 2**20, (hidden, weight)) for o in (out._asdict(), exact)
    )
    for a, b in zip(found, wanted):
        assert (a.double() - b.double()).norm() <= 0.02 * b.double().norm()


def test_head_in_float64(small_tiles):
    hidden, weight, labels = make_head(shape=(1, 5), width=3, vocab=9, dtype=torch.float64)
    for options in OPTIONS:
        exact = expected(hidden @ weight.T, labels, **options)
        out = linear_token_logprobs(hidden, weight, labels, outputs=STATISTICS, **options)
        for name, value in exact.items():
            torch.testing.assert_close(getattr(out, name), value, rtol=0, atol=1e-10)
    torch.autograd.gradcheck(
        lambda h, w: linear_token_logprobs(h, w, labels[:, :3], outputs=["entropy"])[:2],
        (hidden[:, :3].detach().requires_grad_(), weight),
    )


def test_head_compiled_without_graph_breaks():
    hidden, weight, labels = make_head(vocab=64)

    def loss(hidden, weight):
        out = linear_token_logprobs(hidden, weight, labels, outputs=("entropy", "mean_logit"), memory_budget="1MB")
        return out.logps.sum() - 0.1 * out.entropy.sum() + out.mean_logit.sum()

    results = [
        torch.autograd.grad(function(hidden, weight), (hidden, weight))
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
    ]
    torch.testing.assert_close(*results)


def test_nothing_scored(backend, backend_device):
    hidden, weight, labels = make_head(device=backend_device)
    out = linear_token_logprobs(hidden, weight, labels.fill_(-100), outputs=STATISTICS, backend=backend)
    assert all(value.eq(0).all() for value in out if value is not None)
    gradients = torch.autograd.grad(out.logps.sum() + out.entropy.sum(), (hidden, weight))
    assert all(gradient.eq(0).all() for gradient in gradients)
