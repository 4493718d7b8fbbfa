"""The planner: budgets as given, plans that keep to them, and predictions against counted allocations."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.utils.checkpoint

from rpo_kernels import linear_token_logprobs, memory_plan
from rpo_kernels.head import budget as budgets
from rpo_kernels.head import gemm, operator, plan, tiles
from rpo_kernels.kernels import native_head
from rpo_kernels.kernels.softmax import TileSoftmax

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "given, expected",
    [
        (0, 0),
        (1234, 1234),
        ("512MB", 512 * 10**6),
        ("1.5 GiB", 3 * 2**29),
        ("64mb", 64 * 10**6),
        ("2G", 2 * 10**9),
        ("100", 100),
        ("7B", 7),
        ("80GB", 80 * 10**9),
    ],
)
def test_budgets(given, expected):
    assert budgets.parse_budget(given, CPU) == expected


@pytest.mark.parametrize("given", [-1, 1.5, "", "lots", "-3MB", "5 PB", "1e9", True, [1]])
def test_budgets_that_cannot_be_read(given):
    with pytest.raises(ValueError, match="memory_budget"):
        budgets.parse_budget(given, CPU)


def test_default_budget_is_a_part_of_free_memory():
    assert 10**6 < budgets.parse_budget(None, CPU) < 2**50


def test_a_containers_limit_counts(tmp_path):
    assert budgets._container_bytes(tmp_path, 77) == 77  # no such files: no limit
    for name, content in (("max", "1000\n"), ("current", "600\n"), ("stat", "anon 500\ninactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    assert budgets._container_bytes(tmp_path, 77) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert budgets._container_bytes(tmp_path, 77) == 77


def test_free_memory_of_a_gpu_counts_what_its_allocator_holds_unused(monkeypatch):
    reads = []
    counted = {name: {"all": {"current": size}} for name, size in (("reserved_bytes", 50), ("allocated_bytes", 20))}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: reads.append(device) or counted)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    assert budgets._free_bytes(torch.device("cuda")) == 130 and len(reads) == 1
    counted.clear()  # before the allocator's first use
    assert budgets._free_bytes(torch.device("cuda")) == 100


def test_free_memory_is_read_once_a_forward_and_before_the_wait_for_the_device(monkeypatch):
    order = []
    free, find = budgets._free_bytes, operator.find_rows
    monkeypatch.setattr(budgets, "_free_bytes", lambda device: order.append("free") or free(device))
    monkeypatch.setattr(operator, "find_rows", lambda *args: order.append("rows") or find(*args))
    hidden, weight = torch.randn(5, 8).requires_grad_(), torch.randn(300, 8)
    logps = linear_token_logprobs(hidden, weight, torch.arange(5))
    assert order == ["free", "rows"]
    torch.autograd.grad(logps.sum(), hidden)
    assert order == ["free", "rows"]


@pytest.mark.parametrize("sizes", [(-1, 4, 4), (4, 0, 4), (4, 4, 0)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match="must be at least"):
        memory_plan(*sizes)
    for dtype in (torch.int64, "bfloat16"):
        with pytest.raises(ValueError, match="dtype"):
            memory_plan(4, 4, 4, dtype)


SIZES = dict(rows=st.integers(1, 200_000), hidden=st.integers(8, 8192), vocab=st.integers(256, 300_000))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@hypothesis.given(**SIZES, budgets=st.lists(st.floats(1.0, 20.0), min_size=2, max_size=6), trained=st.booleans())
@hypothesis.settings(max_examples=40)
def test_a_larger_budget_is_kept_to_and_never_costs_more_products(device, dtype, rows, hidden, vocab, budgets, trained):
    def planned(budget):
        sizes = (rows, hidden, vocab, dtype)
        return memory_plan(*sizes, needs_hidden=trained, memory_budget=budget, device=device)

    least, most = planned(0), planned(2**60)
    assert least.kept_tiles == 0 and least.head_gemms == 3 + trained
    assert most.kept_tiles == most.tiles and most.head_gemms == 2 + trained
    previous = least
    for factor in sorted(budgets):
        now = planned(int(least.peak_bytes * factor))
        assert now.peak_bytes <= least.peak_bytes * factor
        assert now.head_gemms <= previous.head_gemms
        previous = now


@pytest.mark.parametrize(
    "needs, gemms", [((False, False), 1), ((True, False), 2), ((False, True), 2), ((True, True), 3)]
)
def test_head_gemms(needs, gemms):
    hidden, weight = needs
    chosen = memory_plan(512, 64, 32768, needs_hidden=hidden, needs_weight=weight, memory_budget="10GB")
    assert chosen.head_gemms == gemms
    assert chosen.gradient_bytes == 2 * (512 * 64 * hidden + 32768 * 64 * weight)


def test_gemma_head_in_64_megabytes():
    chosen = memory_plan(1024, 640, 262144, memory_budget="64MB")
    assert chosen.peak_bytes <= 64 * 10**6
    assert 3 < chosen.head_gemms < 4


def peak_of(work):
    """Result of `work`, and the largest and the last number of bytes it held on the CPU beyond those before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert len(events) > 10
    return result, peak, held


BUDGETS = pytest.mark.parametrize("budget", [0, "20MB"])
NEEDS = pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)], ids=["hidden", "weight", "both"])


def predicted_and_measured(rows, positions, hidden, vocab, dtype, needs, budget, backend, softcap=None):
    """The plan, and the peak bytes of a step beyond inputs, result and gradients."""
    inputs = [
        torch.randn(positions, hidden).to(dtype).requires_grad_(needs[0]),
        torch.randn(vocab, hidden).to(dtype).requires_grad_(needs[1]),
    ]
    labels = torch.randint(vocab, (positions,))
    labels[torch.randperm(positions)[rows:]] = -100
    chosen = memory_plan(
        rows,
        hidden,
        vocab,
        dtype,
        needs_hidden=needs[0],
        needs_weight=needs[1],
        positions=positions,
        memory_budget=budget,
        softcap=softcap,
        backend=backend,
    )
    assert (chosen.kept_tiles == 0) == (budget == 0 or not needs[1])

    logps, forward, held = peak_of(
        lambda: linear_token_logprobs(*inputs, labels, softcap=softcap, memory_budget=budget, backend=backend)
    )
    wanted = [x for x in inputs if x.requires_grad]
    _, backward, _ = peak_of(lambda: torch.autograd.grad(logps, wanted, torch.ones_like(logps)))
    early = inputs[1].nbytes if chosen.shared.tiles else 0  # forward allocates the weight's gradient
    return chosen, max(forward - early, held + backward - chosen.gradient_bytes) - logps.nbytes


@BUDGETS
@NEEDS
@pytest.mark.parametrize(
    "backend, rows, positions, hidden, vocab, dtype",
    [
        ("native", 600, 800, 128, 16384, torch.bfloat16),
        ("native", 300, 600, 64, 9000, torch.float32),
        ("torch", 300, 400, 64, 9000, torch.bfloat16),
        ("torch", 300, 600, 64, 9000, torch.float32),
    ],
)
def test_predicted_peak_against_counted_allocations(
    available_backend, backend, rows, positions, hidden, vocab, dtype, needs, budget
):
    available_backend(backend)
    chosen, measured = predicted_and_measured(rows, positions, hidden, vocab, dtype, needs, budget, backend)
    assert measured <= chosen.peak_bytes <= 1.1 * measured


@BUDGETS
@NEEDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_predicted_peak_with_a_softcap(needs, budget, dtype):
    chosen, measured = predicted_and_measured(300, 400, 64, 9000, dtype, needs, budget, "torch", softcap=30.0)
    assert measured <= chosen.peak_bytes <= 1.1 * measured


def as_numpy(x):
    """Half precision as a float32 array, in memory that torch does not count."""
    if x.dtype == torch.float32:
        return x.numpy()
    return (x.view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)


@BUDGETS
@NEEDS
def test_predicted_peak_of_an_accelerator(available_backend, monkeypatch, needs, budget):
    """Products that read bfloat16 and write float32, as on a GPU, made up here."""

    def matmul(left, right, out):
        out.copy_(torch.from_numpy(as_numpy(left) @ as_numpy(right)))

    def add_matmul(total, left, right):
        total.numpy()[...] += as_numpy(left) @ as_numpy(right)

    def scale_rows(self, hidden, factor, before, out):
        for rows in (slice(i, i + 1) for i in range(len(hidden))):  # a CPU's copies in float32 are as large as this
            torch.mul(hidden[rows], factor[rows, None], out=out[rows])

    available_backend("native")
    monkeypatch.setattr(native_head, "serves", lambda *_: False)
    monkeypatch.setattr(TileSoftmax, "scale_rows", scale_rows)
    for module in (plan, tiles):
        monkeypatch.setattr(module, "operand_dtype", lambda dtype, device: dtype)
    monkeypatch.setattr(gemm, "results_in_float32", lambda device, dtype: True)
    monkeypatch.setattr(gemm, "matmul", matmul)
    monkeypatch.setattr(gemm, "add_matmul", add_matmul)
    chosen, measured = predicted_and_measured(600, 800, 128, 16384, torch.bfloat16, needs, budget, "native")
    assert measured <= chosen.peak_bytes <= 1.1 * measured


def test_a_budget_that_cannot_be_met_does_not_crumble_the_work():
    for rows, hidden, vocab, device in ((8192, 640, 262144, "cpu"), (131072, 4096, 128256, "cuda")):
        chosen = memory_plan(rows, hidden, vocab, memory_budget="64MB", device=device)
        roomy = memory_plan(rows, hidden, vocab, memory_budget="100GB", device=device)
        assert chosen.chunk_rows * chosen.tile_columns * 8 >= roomy.chunk_rows * roomy.tile_columns


@pytest.mark.parametrize("scale", [0.01, 3.0], ids=["all-active", "sparse"])
def test_prediction_with_a_filter_is_an_upper_bound(available_backend, scale):
    available_backend("native")
    inputs = [torch.randn(300, 64).requires_grad_(), (scale * torch.randn(9000, 64)).requires_grad_()]
    labels = torch.randint(9000, (300,))
    for budget in (0, "8MB", "1GB"):
        chosen = memory_plan(300, 64, 9000, torch.float32, memory_budget=budget, gradient_filter=1e-4, backend="native")
        logps, forward, held = peak_of(
            lambda budget=budget: linear_token_logprobs(
                *inputs, labels, memory_budget=budget, gradient_filter=1e-4, backend="native"
            )
        )
        _, backward, _ = peak_of(lambda logps=logps: torch.autograd.grad(logps, inputs, torch.ones_like(logps)))
        assert max(forward, held + backward - chosen.gradient_bytes) - logps.nbytes <= chosen.peak_bytes


def test_the_default_budget_stays_within_backward_and_while_it_fits(monkeypatch):
    """Activation checkpointing plans again in backward, when other memory is free."""
    free = [1000]
    monkeypatch.setattr(budgets, "_free_bytes", lambda device: free[0])
    monkeypatch.setattr(budgets, "_defaults", {})
    assert budgets.parse_budget(None, CPU) == 250
    free[0] = 600
    assert budgets.parse_budget(None, CPU) == 250  # still less than half of what is free
    x = torch.ones(1, requires_grad=True)
    seen = []
    y = x * 2
    y.register_hook(lambda _: seen.append(budgets.parse_budget(None, CPU)))
    free[0] = 100
    y.sum().backward()
    assert seen == [250]
    assert budgets.parse_budget(None, CPU) == 25
    free[0] = 10_000
    assert budgets.parse_budget(None, CPU) == 2500


def test_checkpointing_while_free_memory_changes(monkeypatch):
    monkeypatch.setattr(budgets, "_defaults", {})
    free = iter(range(10**9, 0, -(10**8)))
    monkeypatch.setattr(budgets, "_free_bytes", lambda device: next(free))
    hidden, weight = torch.randn(64, 16).requires_grad_(), torch.randn(3000, 16).requires_grad_()
    labels = torch.randint(3000, (64,))
    loss = torch.utils.checkpoint.checkpoint(
        lambda: linear_token_logprobs(hidden, weight, labels).sum(), use_reentrant=False
    )
    monkeypatch.setattr(budgets, "_free_bytes", lambda device: 4000)
    loss.backward()
    assert weight.grad.isfinite().all()


def test_shapes_on_an_accelerator():
    chosen = memory_plan(8192, 4096, 128256, memory_budget="100GB", device="cuda")
    assert (chosen.chunk_rows, chosen.tile_columns) == (8192, 8192)
    for budget in ("64MB", 0):
        chosen = memory_plan(8192, 4096, 128256, memory_budget=budget, device="cuda")
        assert 1024 <= chosen.chunk_rows <= 2048 and chosen.tile_columns == 2048
    assert memory_plan(100, 4096, 1000, device="cuda", memory_budget=0).chunk_rows == 100
