"""linear_token_logprobs and linear_rpo_loss on every backend against the float64 reference over the full logits."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import reference
from rpo_kernels import (
    RPO,
    SimPO,
    linear_rpo_loss,
    linear_token_logprobs,
    memory_plan,
    rpo_loss,
)
from rpo_kernels.head import gemm, plan, tiles
from rpo_kernels.head.schedule import Saved
from rpo_kernels.kernels import dispatch
from rpo_kernels.kernels.interface import TokenOptions

OPS = torch.ops.rpo_kernels
VALUE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-6, torch.float16: 5e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4}
OPTIONS = [
    dict(),
    dict(softcap=5.0),
    dict(shift=True, temperature=0.7, logit_scale=0.5),
    dict(shift=True, temperature=1.3, softcap=7.0, logit_scale=2.0, ignore_index=-1),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Chunks of 16 rows and tiles of 256 columns, so that small inputs have several of both."""
    monkeypatch.setattr(plan, "_SHAPES", {})
    monkeypatch.setattr(plan, "_ACCELERATOR_SHAPE", (16, 256))


@pytest.fixture(params=dispatch.BACKENDS)
def backend(request, live_backend):
    """Each backend that is live here. Triton's interpreter takes seconds a test, so there is one test for it below."""
    name, on = live_backend(request.param)
    if name == "triton" and on == "cpu":
        pytest.skip("triton: interpreted, only in test_triton_interpreted")
    return name


def make(shape=(3, 12), width=24, vocab=700, dtype=torch.float32, device="cpu", bias=False, seed=0, ignore_index=-100):
    """Leaves hidden, weight and bias (or None), and labels of which some repeat and some are ignored."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, width, generator=generator)
    weight = 0.8 * torch.randn(vocab, width, generator=generator)
    offset = torch.randn(vocab, generator=generator) if bias else None
    labels = torch.randint(vocab, shape, generator=generator)
    labels.view(-1)[::5] = vocab - 1
    labels[torch.rand(shape, generator=generator) < 0.3] = ignore_index
    tensors = [None if x is None else x.to(dtype).to(device).requires_grad_() for x in (hidden, weight, offset)]
    return *tensors, labels.to(device)


def expected(hidden, weight, bias, labels, factors, **options):
    """Float64 log-probabilities, and gradients of their sum with these factors."""
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    logits = leaves[0] @ leaves[1].T + (leaves[2] if bias is not None else 0)
    logps = reference.token_logprobs(logits, labels, **options)
    return logps.detach(), torch.autograd.grad((logps * factors).sum(), leaves)


def factors_for(labels):
    return torch.rand(labels.shape, generator=torch.Generator().manual_seed(9)).to(labels.device) - 0.3


def error(got, wanted):
    return ((got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def compare(hidden, weight, bias, labels, backend, memory_budget=None, gradient_filter=None, **options):
    """Values and gradients against the reference."""
    factors = factors_for(labels)
    values, gradients = expected(hidden, weight, bias, labels, factors, **options)
    logps = linear_token_logprobs(
        hidden,
        weight,
        labels,
        bias=bias,
        memory_budget=memory_budget,
        gradient_filter=gradient_filter,
        backend=backend,
        **options,
    )
    assert logps.shape == labels.shape and logps.dtype == torch.promote_types(hidden.dtype, torch.float32)
    torch.testing.assert_close(logps.double(), values, rtol=2e-6, atol=VALUE[hidden.dtype])
    leaves = [x for x in (hidden, weight, bias) if x is not None]
    got = torch.autograd.grad((logps * factors).sum(), leaves)
    # Triton's interpreter cuts float32 down to bfloat16 where a GPU rounds.
    cut = 2 if backend == "triton" and hidden.device.type == "cpu" and hidden.dtype == torch.bfloat16 else 1
    for leaf, mine, exact in zip(leaves, got, gradients):
        assert mine.dtype == leaf.dtype and mine.shape == leaf.shape
        assert error(mine, exact) <= cut * GRADIENT[leaf.dtype]


def plan_keeping(share, rows, hidden, weight, backend, **needs):
    """A budget that keeps none, some or all tiles of the weight's gradient, and its plan."""
    tile = weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))
    for budget in range(0, 10**7, 2000):
        chosen = memory_plan(
            rows,
            weight.shape[1],
            weight.shape[0],
            weight.dtype,
            positions=hidden.shape[:-1].numel(),
            memory_budget=budget,
            device=weight.device,
            backend=dispatch.choose(tile, backend),
            **needs,
        )
        kept = "none" if chosen.kept_tiles == 0 else "all" if chosen.kept_tiles == chosen.tiles else "some"
        if kept == share:
            return budget, chosen
    raise AssertionError(f"no budget keeps {share} of the tiles")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend, backend_device, dtype, bias, options):
    ignore_index = options.get("ignore_index", -100)
    compare(*make(dtype=dtype, device=backend_device, bias=bias, ignore_index=ignore_index), backend, **options)


@pytest.mark.parametrize("dtype, options", [(torch.float32, OPTIONS[0]), (torch.bfloat16, OPTIONS[3])], ids=str)
@pytest.mark.parametrize("gradient_filter", [None, 0.0])
def test_triton_interpreted(live_backend, dtype, options, gradient_filter):
    backend, device = live_backend("triton")
    *leaves, labels = make((2, 10), vocab=600, dtype=dtype, device=device, bias=True, ignore_index=-1)
    for budget in (0, None):
        compare(
            *(*leaves, labels, backend),
            memory_budget=budget,
            gradient_filter=gradient_filter,
            **{**options, "ignore_index": -1},
        )


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kept", ["none", "some", "all"])
def test_budgets_mix_kept_and_recomputed_tiles(backend, backend_device, kept, options):
    for dtype in (torch.float32, torch.bfloat16):
        *leaves, labels = make(vocab=3000, dtype=dtype, device=backend_device, bias=True, ignore_index=-1)
        rows = int((labels != -1).sum()) - (int((labels[:, 0] != -1).sum()) if options.get("shift") else 0)
        budget, _ = plan_keeping(kept, rows, leaves[0], leaves[1], backend)
        compare(*leaves, labels, backend, memory_budget=budget, **{**options, "ignore_index": -1})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_float64_is_exact_to_rounding(options):
    *leaves, labels = make(dtype=torch.float64, bias=True, ignore_index=options.get("ignore_index", -100))
    for gradient_filter in (None, 0.0):
        compare(*leaves, labels, "torch", gradient_filter=gradient_filter, **options)
    *leaves, labels = make((2, 3), 4, 300, torch.float64, bias=True, ignore_index=options.get("ignore_index", -100))
    torch.autograd.gradcheck(
        lambda h, w, b: linear_token_logprobs(h, w, labels, bias=b, **options), leaves, fast_mode=True
    )


@pytest.mark.parametrize("shape", [(5,), (1,), (0,), (2, 0), (0, 3), (3, 1), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("shift", [False, True])
def test_shapes(backend, backend_device, shape, shift):
    compare(*make(shape, device=backend_device), backend, shift=shift)


@pytest.mark.parametrize("vocab", [1, 5, 256, 257, 513])
def test_small_vocabularies(backend, backend_device, vocab):
    compare(*make(vocab=vocab, device=backend_device, bias=True), backend)


def test_no_scored_row(backend, backend_device):
    hidden, weight, bias, labels = make(device=backend_device, bias=True)
    logps = linear_token_logprobs(hidden, weight, torch.full_like(labels, -100), bias=bias, backend=backend)
    assert not logps.any()
    for gradient in torch.autograd.grad(logps.sum(), (hidden, weight, bias)):
        assert not gradient.any()


def test_unscored_rows_are_not_read(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)
    poisoned = hidden.detach().masked_fill((labels == -100)[..., None], torch.nan).requires_grad_()
    logps = linear_token_logprobs(poisoned, weight, labels, backend=backend)
    gradients = torch.autograd.grad(logps.sum(), (poisoned, weight))
    assert all(x.isfinite().all() for x in (logps, *gradients))


def test_strided_inputs(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)
    compare(hidden.detach().transpose(0, 1).requires_grad_(), weight, None, labels.T, backend)
    compare(hidden.detach()[:, ::2].requires_grad_(), weight, None, labels[:, ::2], backend)
    tied = weight.detach().T.contiguous().T.requires_grad_()
    compare(hidden, tied, None, labels, backend)
    compare(hidden, weight.detach()[::2].requires_grad_(), None, labels.clamp(max=300), backend)


def test_int32_labels(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)
    compare(hidden, weight, None, labels.int(), backend)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_large_logits(backend, backend_device, scale):
    """A softmax that grows by many orders of magnitude from tile to tile, labels of all probabilities."""
    hidden, weight, _, labels = make(device=backend_device)
    ramp = torch.linspace(0, scale, len(weight), device=backend_device)[:, None]
    compare(hidden, (weight.detach() * ramp).requires_grad_(), None, labels, backend)
    compare(hidden, (weight.detach() * ramp.flip(0)).requires_grad_(), None, labels, backend)


@pytest.mark.parametrize("masked", [slice(0, 300), slice(256, 512), slice(500, 700), slice(0, 699)], ids=str)
def test_a_bias_of_minus_infinity_masks_columns(backend, backend_device, masked):
    hidden, weight, bias, labels = make(device=backend_device, bias=True)
    with torch.no_grad():
        bias[masked] = -torch.inf
    allowed = [i for i in range(700) if not masked.start <= i < masked.stop]
    labels = torch.where(labels < 0, labels, torch.tensor(allowed, device=backend_device)[labels % len(allowed)])
    compare(hidden, weight, bias, labels, backend)
    labels[0, 0] = masked.start  # impossible, and says so
    logps = linear_token_logprobs(hidden, weight, labels, bias=bias, backend=backend)
    assert logps[0, 0] == -torch.inf and logps[0, 1:].isfinite().all()
    (gradient,) = torch.autograd.grad(logps[0, 0], weight)
    assert gradient.isfinite().all()


def test_nan_propagates(backend, backend_device):
    hidden, weight, _, labels = make(device=backend_device)
    labels[0, :2] = 3
    with torch.no_grad():
        hidden[0, 0] = torch.nan
    logps = linear_token_logprobs(hidden, weight, labels, backend=backend)
    assert logps[0, 0].isnan() and logps[0, 1:].isfinite().all()
    grad_hidden, grad_weight = torch.autograd.grad(logps.sum(), (hidden, weight))
    assert grad_hidden[0, 0].isnan().all() and grad_hidden[0, 1].isfinite().all() and grad_weight.isnan().all()


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "hb", "wb"])
def test_only_what_needs_a_gradient_is_computed(backend, backend_device, needs, monkeypatch):
    """The products' sizes, counted, are as many head GEMMs as planned: 1 to 3, and up to 4 past the budget."""
    hidden, weight, bias, labels = make(vocab=3000, device=backend_device, bias=True)
    leaves = [x.detach().requires_grad_(name in needs) for name, x in zip("hwb", (hidden, weight, bias))]
    factors = factors_for(labels)
    _, gradients = expected(hidden, weight, bias, labels, factors)
    rows = int((labels != -100).sum())
    done = count_products(monkeypatch)
    of_weight = "w" in needs or "b" in needs
    for kept in ("none", "some", "all") if of_weight else ("none",):
        done.clear()
        budget, chosen = plan_keeping(
            kept, rows, hidden, weight, backend, needs_hidden="h" in needs, needs_weight=of_weight
        )
        logps = linear_token_logprobs(
            leaves[0], leaves[1], labels, bias=leaves[2], memory_budget=budget, backend=backend
        )
        assert logps.requires_grad == bool(needs)
        if needs:
            wanted = {name: x for name, x in zip("hwb", leaves) if x.requires_grad}
            for name, mine in zip(wanted, torch.autograd.grad((logps * factors).sum(), list(wanted.values()))):
                assert error(mine, gradients["hwb".index(name)]) < 2e-6
        # The plan takes the weight's gradient to be among those needed; the bias's alone is a product with one column.
        gemms = chosen.head_gemms - (of_weight and "w" not in needs) + ("b" in needs) / 24
        assert sum(done) / (rows * 24 * 3000) == pytest.approx(gemms)


def test_same_input_same_bits(backend, backend_device):
    *leaves, labels = make((4, 30), device=backend_device, dtype=torch.bfloat16, bias=True)
    labels[:, ::3] = 7

    def run():
        logps = linear_token_logprobs(
            leaves[0], leaves[1], labels, bias=leaves[2], memory_budget="1MB", backend=backend
        )
        return logps, *torch.autograd.grad((logps * factors_for(labels)).sum(), leaves)

    for first, second in zip(run(), run()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("mixed", [True, False], ids=["float32 products", "half products"])
@pytest.mark.parametrize("gradient_filter", [None, 0.0, 2**-14])
def test_the_way_of_accelerators(live_backend, monkeypatch, mixed, gradient_filter):
    """GEMMs that read half precision and, if they can, write float32: on a CPU, with such products made up."""

    def multiply(left, right, out):
        product = left.float() @ right.float()
        out.copy_(product if mixed else product.to(left.dtype))

    backend, _ = live_backend("native")
    for module in (plan, tiles):
        monkeypatch.setattr(module, "operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(gemm, "results_in_float32", lambda device, dtype: mixed or dtype.itemsize >= 4)
    monkeypatch.setattr(gemm, "matmul", multiply)
    monkeypatch.setattr(gemm, "add_matmul", lambda total, left, right: total.add_(left.float() @ right.float()))
    hidden, weight, bias, labels = make(dtype=torch.bfloat16, bias=True)
    factors = factors_for(labels)
    values, exact = expected(hidden, weight, bias, labels, factors, softcap=30.0)
    for budget in (0, 150_000, None):
        logps = linear_token_logprobs(
            *(hidden, weight, labels),
            bias=bias,
            softcap=30.0,
            memory_budget=budget,
            gradient_filter=gradient_filter,
            backend=backend,
        )
        torch.testing.assert_close(logps.double(), values, rtol=1e-5, atol=1e-5 if mixed else 0.1)
        for mine, wanted in zip(torch.autograd.grad((logps * factors).sum(), (hidden, weight, bias)), exact):
            assert error(mine, wanted) < (5e-3 if mixed else 2e-2)


# ----------------------------------------------------------------------------------------------------- column filter


def sparse(device, dtype=torch.float32, vocab=1500):
    """A head whose softmax lies on a few columns, as a trained model's."""
    hidden, weight, bias, labels = make((4, 12), vocab=vocab, dtype=dtype, device=device, bias=True)
    with torch.no_grad():
        weight *= 0.3
        bias -= 12
        bias[::40] += 14
    return hidden, weight, bias, labels


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("threshold", [2**-6, 2**-9, 2**-12])
def test_filter_error_is_bounded_by_the_dropped_mass(backend, backend_device, threshold, options):
    hidden, weight, bias, labels = sparse(backend_device)
    options = {**options, "ignore_index": -100}
    factors = factors_for(labels)
    values, exact = expected(hidden, weight, bias, labels, factors, **options)
    for budget in (None, 0, "100KB"):
        outputs = linear_token_logprobs(
            *(hidden, weight, labels),
            bias=bias,
            gradient_filter=threshold,
            memory_budget=budget,
            outputs=("dropped",),
            backend=backend,
            **options,
        )
        logps, dropped = outputs.logps, outputs.dropped
        torch.testing.assert_close(logps.double(), values, rtol=2e-6, atol=5e-6)
        gradients = torch.autograd.grad((logps * factors).sum(), (hidden, weight, bias))
        at_hidden = torch.cat((dropped[:, 1:], dropped[:, :1] * 0), 1) if options.get("shift") else dropped
        c = torch.cat((factors[:, 1:], factors[:, :1] * 0), 1) if options.get("shift") else factors
        bound = at_hidden * c.abs() * weight.norm(dim=1).max()
        assert ((gradients[0] - exact[0]).norm(dim=-1) <= bound + 1e-5).all()
        # Of the weight's rows, each lacks at most the dropped columns' part of every position.
        missing = (dropped * factors.abs()).sum()
        assert (gradients[1] - exact[1]).norm(dim=-1).sum() <= missing * hidden.norm(dim=-1).max() + 1e-3
        assert (gradients[2] - exact[2]).abs().sum() <= missing + 1e-4
        if threshold == 2**-6:
            assert 0 < dropped.max() < 1 and error(gradients[0], exact[0]) > 1e-5  # something was left out


def test_dropped_mass_is_the_softmax_on_the_columns_left_out(backend, backend_device, monkeypatch):
    monkeypatch.setattr(plan, "_ACCELERATOR_SHAPE", (64, 256))  # one chunk: a column is out for all rows or for none
    hidden, weight, bias, labels = sparse(backend_device)
    outputs = linear_token_logprobs(
        hidden, weight, labels, bias=bias, gradient_filter=2**-7, outputs=("dropped",), backend=backend
    )
    logps, dropped = outputs.logps, outputs.dropped
    grad_weight, grad_bias = torch.autograd.grad((logps * factors_for(labels)).sum(), (weight, bias))
    out = (grad_weight == 0).all(-1)
    assert torch.equal(out, grad_bias == 0) and 0 < out.sum() < len(out)
    softmax = (hidden.double() @ weight.double().T + bias.double()).softmax(-1)
    torch.testing.assert_close(
        dropped.double(), torch.where(labels != -100, softmax[..., out].sum(-1), 0), rtol=1e-5, atol=1e-7
    )
    assert (softmax[labels != -100][:, out] <= 2**-7 * 1.001).all()


def test_filter_of_zero_is_exact(backend, backend_device):
    for budget in (None, 0):
        compare(*sparse(backend_device, torch.bfloat16), backend, gradient_filter=0.0, memory_budget=budget)


def count_products(monkeypatch):
    """A list to which each product adds its multiplications."""
    done = []
    for name, first in (("matmul", 0), ("add_matmul", 1)):

        def counted(*args, original=getattr(gemm, name), first=first):
            left, right = args[first : first + 2]
            done.append(left.shape[0] * left.shape[1] * right.shape[1])
            original(*args)

        monkeypatch.setattr(gemm, name, counted)
    return done


@pytest.mark.parametrize("frozen", [False, True])
def test_filter_saves_products(backend, backend_device, monkeypatch, frozen):
    hidden, weight, bias, labels = sparse(backend_device)
    weight.requires_grad_(not frozen)
    done = count_products(monkeypatch)
    one = int((labels != -100).sum()) * 24 * 1500
    wanted = (hidden,) if frozen else (hidden, weight)
    for scale, least, most in ((1, 0.001, 0.2), (0, 1, 1)):  # of all columns, when the head is all zeros
        logps = linear_token_logprobs(
            hidden, weight * scale, labels, bias=bias.detach() * scale, gradient_filter=2**-7 * scale, backend=backend
        )
        assert sum(done) == one
        done.clear()
        torch.autograd.grad(logps.sum(), wanted)
        assert least <= sum(done) / one / (2 if frozen else 3) <= most
        done.clear()


# -------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("gradient_filter", [None, 2**-10])
@pytest.mark.parametrize("outputs", [[], ["entropy", "is_top1"]])
def test_opcheck(backend, backend_device, gradient_filter, outputs):
    hidden, weight, bias, labels = make((2, 6), device=backend_device, bias=True)
    rows = hidden.detach().flatten(0, 1).requires_grad_()
    options = {**TokenOptions(shift=True)._asdict(), "gradient_filter": gradient_filter, "backend": backend}
    options |= dict(entropy_grad=bool(outputs), outputs=outputs)
    needs = dict(needs_hidden=True, needs_weight=True)
    forward = {**options, **needs, "memory_budget": 10**6}
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
            outputs=[],
            entropy_grad=False,
        )
    saved = Saved(*outputs[4:])
    assert saved.kept.numel() == saved.unit.numel() == saved.references.numel() == 0


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("objective", [RPO(), RPO("sq"), SimPO()], ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "ragged", "stacked"])
def test_linear_rpo_loss_is_rpo_loss(layout, objective):
    """To rounding in float64, gradients included, with every way of giving the reference."""
    hidden, weight, bias, labels = make((4, 8), dtype=torch.float64, bias=True)
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(4, generator=generator)
    ref_hidden = torch.randn(4, 8, 10, generator=generator).double()
    ref_weight = torch.randn(700, 10, generator=generator).double().requires_grad_()
    options = dict(objective=objective, shift=True, softcap=9.0, token_weights=torch.rand(4, 8, generator=generator))
    if layout == "packed":
        hidden, labels, ref_hidden = (x.detach().flatten(0, 1) for x in (hidden, labels, ref_hidden))
        hidden.requires_grad_()
        options["cu_seqlens"] = torch.tensor([0, 3, 16, 16, 32])
        options["token_weights"] = options["token_weights"].flatten()
    elif layout == "ragged":
        options["group_ids"] = [0, 1, 1, 1]
    elif layout == "stacked":
        options["layout"] = layout
    if objective.reference_free:
        references = [({}, {})]
    else:
        references = [
            (dict(ref_logps=-torch.rand(4, generator=generator)),) * 2,
            (
                dict(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=bias.detach()),
                dict(ref_logits=ref_hidden @ ref_weight.T + bias.detach()),
            ),
            (dict(ref_hidden=hidden.detach() / 2), dict(ref_logits=hidden.detach() / 2 @ weight.T + bias)),
        ]
    for of_hidden, of_logits in references:
        mine = linear_rpo_loss(hidden, weight, labels, rewards, bias=bias, **of_hidden, **options)
        plain = rpo_loss(hidden @ weight.T + bias, labels, rewards, **of_logits, **options)
        assert mine.dropped is None
        for name, x, y in zip(mine._fields, mine, plain):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10, msg=name)
        for x, y in zip(
            torch.autograd.grad(mine.loss, (hidden, weight, bias)),
            torch.autograd.grad(plain.loss, (hidden, weight, bias)),
        ):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert ref_weight.grad is None


def test_linear_rpo_loss_reports_what_the_filter_dropped(backend, backend_device):
    hidden, weight, bias, labels = sparse(backend_device)
    rewards, ref = torch.randn(4, device=backend_device), torch.zeros(4, device=backend_device)
    out = linear_rpo_loss(
        hidden, weight, labels, rewards, bias=bias, ref_logps=ref, gradient_filter=2**-7, backend=backend
    )
    assert out.dropped.shape == labels.shape and (out.dropped > 0).any() and not out.dropped[labels == -100].any()


# ------------------------------------------------------------------------------------------------------------- errors


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
        "bias must be .700.": dict(bias=bias[1:]),
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
