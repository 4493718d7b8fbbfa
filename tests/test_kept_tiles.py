"""P of the kept tiles in the memory of the weight's gradient: its layout, and who may overwrite it when."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from head_cases import OPS, compare, make
from rpo_kernels import linear_token_logprobs, memory_plan
from rpo_kernels.head import gemm
from rpo_kernels.head.backward import TileSum
from rpo_kernels.head.budget import parse_budget
from rpo_kernels.head.cpu import plan as cpu_plan
from rpo_kernels.head.schedule import Saved
from rpo_kernels.kernels.interface import TokenOptions
from rpo_kernels.kernels.kept import SharedTiles

NEEDS = dict(needs_hidden=True, needs_weight=True)


@given(
    rows=st.integers(0, 3000),
    tile=st.sampled_from([14, 252, 256, 2016, 4096]),
    vocab=st.integers(1, 40000),
    width=st.integers(1, 5000),
    kept=st.integers(0, 200),
)
def test_a_gradient_overwrites_only_p_that_was_read(rows, tile, vocab, width, kept):
    rows = -(-rows // 32) * 32 if tile % 14 == 0 else rows  # the CPU's panels
    shared = SharedTiles.fit(rows, tile, vocab, width, kept=kept, largest=tile * 2)
    assert 0 <= shared.tiles <= kept and (shared.tiles == 0 or shared.first % 32 == 0)
    assert shared.tiles in (0, kept) or 2 * shared.tiles * rows * tile >= vocab * width
    for number in range(shared.tiles):
        assert (number + 1) * tile < vocab  # whole, and not the last
        assert shared.start(number) + rows * tile <= vocab * width
        gradient_end = (number + 1) * tile * width
        assert shared.overlaps(number) == (gradient_end > shared.start(number))
        if number + 1 < shared.tiles:
            assert gradient_end <= shared.start(number + 1)
    assert shared.any_overlaps == any(map(shared.overlaps, range(shared.tiles)))


SHAPES = {
    "more rows than width": dict(shape=(5, 20), width=24),
    "fewer rows than width": dict(shape=(2, 24), width=40),
    "as many": dict(shape=(4, 10), width=28),
    "odd": dict(shape=(1, 47), width=37, vocab=1501),
}


@pytest.fixture(params=[*(("native", shape) for shape in SHAPES), ("torch", "odd")], ids=": ".join)
def case(request, available_backend, small_tiles, monkeypatch):
    """A backend; and a function of the dtype that makes hidden states, weight, bias and labels, for several tiles."""
    name, shape = request.param
    backend, device = available_backend(name)
    monkeypatch.setattr(cpu_plan, "_SHAPES", ((64, 252),))
    return backend, lambda dtype: make(**{"vocab": 1500, **SHAPES[shape]}, dtype=dtype, device=device, bias=True)


def logps_of(tensors, backend, **options):
    hidden, weight, bias, labels = tensors
    return linear_token_logprobs(hidden, weight, labels, bias=bias, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_is_that_of_its_own_memory_to_the_bit(case, dtype):
    backend, tensors = case
    *leaves, labels = tensors(dtype)
    compare(*leaves, labels, backend, memory_budget="1GB")
    logps = logps_of((*leaves, labels), backend, memory_budget="1GB")
    apart = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)  # twice from the same saved tensors
    again = torch.autograd.grad(logps.sum(), leaves, retain_graph=True)
    inplace = torch.autograd.grad(logps.sum(), leaves)
    for other in (again, inplace):
        assert all(torch.equal(x, y) for x, y in zip(apart, other, strict=True))
    with pytest.raises(RuntimeError, match="a second time"):
        logps.sum().backward()


def test_triton_interpreted(available_backend, small_tiles):
    backend, device = available_backend("triton")
    hidden, weight, bias, labels = make((1, 36), vocab=800, dtype=torch.bfloat16, device=device, bias=True)
    compare(hidden, weight, bias, labels, backend, memory_budget="1GB")
    logps = logps_of((hidden, weight, bias, labels), backend, memory_budget="1GB")
    assert saved_gradient(logps).shape == weight.shape
    apart = torch.autograd.grad(logps.sum(), weight, retain_graph=True)
    assert torch.equal(torch.autograd.grad(logps.sum(), weight)[0], apart[0])


def saved_gradient(logps):
    """The saved tensor that holds P and becomes the weight's gradient."""
    node = logps.grad_fn
    while not hasattr(node, "saved_tensors"):  # of views
        node = node.next_functions[0][0]
    return Saved(*node.saved_tensors[4:]).grad_weight  # after hidden, weight, bias, labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_has_the_memory_that_forward_allocated(case, dtype):
    backend, tensors = case
    hidden, weight, bias, labels = tensors(dtype)
    logps = logps_of((hidden, weight, bias, labels), backend, memory_budget="1GB")
    memory = saved_gradient(logps)
    assert memory.shape == weight.shape and memory.dtype == weight.dtype
    address = memory.data_ptr()
    del memory
    logps.sum().backward()
    assert weight.grad.data_ptr() == address and weight.grad.is_contiguous()
    assert weight.grad.untyped_storage().nbytes() == weight.nbytes


def keep(stored):
    def pack(x):
        stored.append((x, x.clone()))
        return x

    return torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)


def test_what_hooks_hold_is_not_overwritten(case):
    backend, tensors = case
    *leaves, labels = tensors(torch.bfloat16)
    wanted = torch.autograd.grad(logps_of((*leaves, labels), backend, memory_budget="1GB").sum(), leaves)
    stored = []
    with keep(stored):
        logps = logps_of((*leaves, labels), backend, memory_budget="1GB")
    got = torch.autograd.grad(logps.sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    assert len(stored) > 4 and all(torch.equal(now, before) for now, before in stored)


def test_under_checkpoint_and_save_on_cpu(case):
    backend, tensors = case
    *leaves, labels = tensors(torch.bfloat16)

    def loss(*leaves):
        return logps_of((*leaves, labels), backend, memory_budget="1GB").sum()

    wanted = torch.autograd.grad(loss(*leaves), leaves)
    with torch.autograd.graph.save_on_cpu():
        offloaded = loss(*leaves)
    for other in (offloaded, checkpoint(loss, *leaves, use_reentrant=False)):
        got = torch.autograd.grad(other, leaves)
        assert all(torch.equal(x, y) for x, y in zip(got, wanted, strict=True))
    checkpoint(loss, *leaves, use_reentrant=True).backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, wanted, strict=True))


def test_a_tied_weight_and_two_calls_accumulate(case):
    backend, tensors = case
    hidden, weight, bias, labels = tensors(torch.float32)

    def loss(scale):
        logps = [logps_of((scale * hidden, weight, bias, labels), backend, memory_budget="1GB") for _ in range(2)]
        return logps[0].sum() + 2 * logps[1].sum() + (weight**2).sum()

    once = torch.autograd.grad(logps_of((hidden, weight, bias, labels), backend, memory_budget="1GB").sum(), weight)[0]
    for _ in range(2):
        loss(1.0).backward()
    torch.testing.assert_close(weight.grad, 6 * once + 4 * weight.detach(), rtol=1e-5, atol=1e-4)


def test_create_graph_and_single_gradients_leave_it(case):
    backend, tensors = case
    *leaves, labels = tensors(torch.bfloat16)
    logps = logps_of((*leaves, labels), backend, memory_budget="1GB")
    before = saved_gradient(logps).clone().view(torch.int16)
    torch.autograd.grad(logps.sum(), leaves, create_graph=True)
    torch.autograd.grad(logps.sum(), leaves[0], retain_graph=True)
    torch.autograd.grad(logps.sum(), leaves[2], retain_graph=True)
    assert torch.equal(saved_gradient(logps).view(torch.int16), before)


def test_only_the_biass_gradient_takes_no_memory_for_the_weights(case):
    backend, tensors = case
    hidden, weight, bias, labels = tensors(torch.float32)
    logps = logps_of((hidden, weight.detach(), bias, labels), backend, memory_budget="1GB")
    assert saved_gradient(logps).numel() == 0


def test_opcheck_of_the_overwriting_operator(case):
    backend, tensors = case
    *leaves, labels = tensors(torch.bfloat16)
    inputs = (leaves[0].detach().flatten(0, 1), leaves[1].detach(), leaves[2].detach(), labels.flatten()[None])
    options = TokenOptions()._asdict() | dict(gradient_filter=None, outputs=[], entropy_grad=False, backend=backend)
    forward = options | NEEDS | dict(memory_budget=10**9, inplace_backward=True)
    logps, _, _, _, *saved = OPS.linear_token_logprobs(*inputs, **forward)
    saved = Saved(*saved)
    assert saved.grad_weight.shape == inputs[1].shape
    others = [*saved._replace(grad_weight=logps.new_empty(0))]
    arguments = (saved.grad_weight, *inputs, torch.ones_like(logps), None, others)
    backward = options | dict(needs_hidden=True, needs_bias=True)
    version = saved.grad_weight._version
    OPS.linear_token_logprobs_grad_(*arguments, **backward)
    assert saved.grad_weight._version > version
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.linear_token_logprobs_grad_, arguments, backward, test_utils=checks)


@pytest.mark.parametrize("rows, width, budget", [(512, 640, "64MB"), (1024, 640, "64MB"), (2500, 4096, "300MB")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_plan_keeps_more_in_the_same_memory(rows, width, budget, device):
    sizes = dict(device=device, memory_budget=budget)
    shared = memory_plan(rows, width, 262144, **sizes)
    apart = memory_plan(rows, width, 262144, inplace_backward=False, **sizes)
    assert shared.kept_tiles * shared.tile_columns > apart.kept_tiles * apart.tile_columns
    assert shared.head_gemms < apart.head_gemms and shared.peak_bytes <= parse_budget(budget, torch.device("cpu"))
    if rows < width:
        assert shared.kept_tiles == shared.tiles and shared.head_gemms == 3


@pytest.fixture
def tile_sum(monkeypatch):
    """A function of the operands' dtype: a bfloat16 gradient of NaN and its `TileSum`, with products as on a GPU."""

    def matmul(left, right, out):
        out.copy_(left.double() @ right.double())

    def add_matmul(total, left, right):
        total.copy_(total.double() + left.double() @ right.double())

    monkeypatch.setattr(gemm, "matmul", matmul)
    monkeypatch.setattr(gemm, "add_matmul", add_matmul)

    def of(operand_dtype):
        gradient = torch.full((4, 3), torch.nan, dtype=torch.bfloat16)
        return gradient, TileSum(gradient, SimpleNamespace(exact_dtype=torch.float32, operand_dtype=operand_dtype))

    return of


@pytest.mark.parametrize("operand_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_tile_apart_is_written_at_its_end(tile_sum, operand_dtype):
    gradient, total = tile_sum(operand_dtype)
    left, right = torch.full((2, 5), 1.5, dtype=operand_dtype), torch.full((5, 3), 0.25, dtype=operand_dtype)
    total.begin(slice(0, 2), products=1, apart=True)
    total.add(left, right, None)
    assert gradient.isnan().all()
    total.finish()
    assert (gradient[:2] == 1.875).all() and gradient[2:].isnan().all()


@pytest.mark.parametrize("apart", [False, True])
def test_several_products_are_rounded_once(tile_sum, apart):
    """1 + 2^-8 lies between two numbers of bfloat16, and rounds to 1; with another 2^-8 the sum is one of them."""
    gradient, total = tile_sum(torch.bfloat16)
    one = torch.ones(1, 3, dtype=torch.bfloat16)
    total.begin(slice(0, 2), products=1, apart=True)  # as a kept tile before it, in memory of another dtype
    total.add(torch.ones(2, 1, dtype=torch.bfloat16), one, None)
    total.finish()
    total.begin(slice(2, 4), products=2, apart=apart)
    total.add(torch.tensor([[1.0, 2.0**-8]] * 2).bfloat16(), one.expand(2, 3), None)
    total.add(torch.tensor([[2.0**-8]] * 2).bfloat16(), one, None)
    total.finish()
    assert gradient.tolist() == [[1.0] * 3] * 2 + [[1 + 2.0**-7] * 3] * 2
