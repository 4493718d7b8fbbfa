"""linear_token_logprobs on every backend against the float64 reference over the full logits."""

import pytest
import torch

from head_cases import OPTIONS, compare, count_products, error, expected, factors_for, make, plan_keeping
from rpo_kernels import linear_token_logprobs
from rpo_kernels.head import gemm, plan, tiles

pytestmark = pytest.mark.usefixtures("small_tiles")
INTERPRETED = False


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(backend, backend_device, dtype, bias, options):
    ignore_index = options.get("ignore_index", -100)
    compare(*make(dtype=dtype, device=backend_device, bias=bias, ignore_index=ignore_index), backend, **options)


@pytest.mark.parametrize("dtype, options", [(torch.float32, OPTIONS[0]), (torch.bfloat16, OPTIONS[3])], ids=str)
@pytest.mark.parametrize("gradient_filter", [None, 0.0])
def test_triton_interpreted(available_backend, dtype, options, gradient_filter):
    backend, device = available_backend("triton")
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
        *leaves, labels = make((4, 14), 24, 3000, dtype, backend_device, bias=True, ignore_index=-1)
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
        wanted = dict(needs_hidden="h" in needs, needs_weight=of_weight, inplace_backward="w" in needs)
        budget, chosen = plan_keeping(kept, rows, hidden, weight, backend, **wanted)
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
def test_the_way_of_accelerators(available_backend, monkeypatch, mixed, gradient_filter):
    """GEMMs that read half precision and, if they can, write float32: on a CPU, with such products made up."""

    def matmul(left, right, out):
        product = left.float() @ right.float()
        out.copy_(product if mixed else product.to(left.dtype))

    backend, _ = available_backend("native")
    for module in (plan, tiles):
        monkeypatch.setattr(module, "operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(gemm, "results_in_float32", lambda device, dtype: mixed or dtype.itemsize >= 4)
    monkeypatch.setattr(gemm, "matmul", matmul)
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
