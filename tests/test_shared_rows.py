"""Several labels scored against one row: against the same rows copied, in values and gradients."""

import pytest
import torch

from rpo_kernels import RPO, linear_rpo_loss, linear_token_logprobs, rpo_loss, token_logprobs

STATISTICS = ("entropy", "mean_logit", "is_top1", "log_sum_sq_probs")
OPTIONS = [{}, dict(softcap=3.0, logit_scale=1.5, temperature=0.7)]


def problem(dtype: torch.dtype, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits `[7, 33]`, labels `[12]` and their rows: shared, equal labels on one row, unscored ones, rows unused."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 33, generator=generator, dtype=torch.float64) * 3).to(dtype)
    labels = torch.tensor([5, 5, 0, 32, -100, 7, 7, 9, -100, 1, 30, -100])
    rows = torch.tensor([2, 2, 2, 0, 2, 3, 3, 3, 4, 6, 6, 3])
    return logits.to(device), labels.to(device), rows.to(device)


def gradient(logits: torch.Tensor, logps: torch.Tensor) -> torch.Tensor:
    weights = torch.linspace(-2, 1, len(logps), dtype=logps.dtype, device=logps.device)
    return torch.autograd.grad(logps, logits, weights, retain_graph=True)[0]


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_like_copied_rows(backend, backend_device, dtype, options, inplace_backward):
    """Against `token_logprobs(logits[rows], labels)` in float64."""
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("only the torch backend takes float64")
    logits, labels, rows = problem(dtype, backend_device)
    exact = logits.double().requires_grad_()
    expected = token_logprobs(exact[rows], labels, backend="torch", **options)
    leaf = logits.clone().requires_grad_()
    logps = token_logprobs(leaf * 1, labels, rows=rows, backend=backend, inplace_backward=inplace_backward, **options)
    assert logps.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(
        gradient(leaf, logps).double(), gradient(exact, expected), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_like_copied_rows(backend, backend_device, dtype, options):
    """All of them, and the gradient of the log-probabilities and entropies, against copied rows in float64."""
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("only the torch backend takes float64")
    logits, labels, rows = problem(dtype, backend_device)
    logits[3, 9] = logits[3, 7] = 20.0  # two labels of a row that tie, and two others that are not its largest
    logits[2, 5] = 15.0
    exact = logits.double().requires_grad_()
    expected = token_logprobs(exact[rows], labels, outputs=STATISTICS, backend="torch", **options)
    assert expected.is_top1.tolist() == [1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    given = dict(rows=rows, outputs=STATISTICS, backend=backend, **options)
    out = token_logprobs(logits, labels, **given)
    for name in ("logps", *STATISTICS):
        found, value = getattr(out, name), getattr(expected, name)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for loss in (lambda x: x.entropy, lambda x: x.logps + 0.5 * x.entropy.square()):
        for inplace_backward in (False, True):
            leaf = logits.clone().requires_grad_()
            out = token_logprobs(leaf * 1, labels, inplace_backward=inplace_backward, **given)
            assert [x.requires_grad for x in out[:-1]] == [True, True, False, False, False]
            grad = gradient(leaf, loss(out)).double()
            torch.testing.assert_close(grad, gradient(exact, loss(expected)), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", OPTIONS)
def test_outputs_of_the_head_like_copied_rows(backend, backend_device, options):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 16, generator=generator).to(backend_device).requires_grad_()
    weight = torch.randn(33, 16, generator=generator).to(backend_device).requires_grad_()
    _, labels, rows = problem(torch.float32, backend_device)
    expected = token_logprobs((hidden.double() @ weight.double().T)[rows], labels, outputs=STATISTICS, **options)
    out = linear_token_logprobs(hidden, weight, labels, rows=rows, outputs=STATISTICS, backend=backend, **options)
    for name in ("logps", *STATISTICS):
        found, value = getattr(out, name).double(), getattr(expected, name)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    for leaf in (hidden, weight):
        grads = [gradient(leaf, x.logps + 0.5 * x.entropy.square()) for x in (out, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_a_row_with_one_label_has_the_same_bits(backend, backend_device):
    logits, labels, _ = problem(torch.float32, backend_device)
    logits, labels = logits.requires_grad_(), labels[:7]
    results = []
    for rows in (None, torch.arange(7, device=backend_device)):
        logps = token_logprobs(logits, labels, rows=rows, backend=backend)
        results.append((logps, gradient(logits, logps)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


def test_a_softcap_that_saturates_makes_ties(backend, backend_device):
    """The first of the labels that it makes equal is the prediction, with shared rows as with copied ones."""
    logits = torch.zeros(1, 4)
    logits[0, 1:3] = torch.tensor([40.0, 50.0])
    given = dict(softcap=1.0, outputs=("is_top1",), backend=backend)
    labels, rows, logits = (x.to(backend_device) for x in (torch.tensor([2, 1, 0]), torch.zeros(3).long(), logits))
    assert token_logprobs(logits, labels, rows=rows, **given).is_top1.tolist() == [0, 1, 0]
    assert token_logprobs(logits[rows], labels, **given).is_top1.tolist() == [0, 1, 0]


def test_certain_labels_keep_their_gradient():
    """Where p rounds to 1, 1 - p comes from the log-probability."""
    logits = torch.zeros(1, 4)
    logits[0, 2] = 40.0
    logits.requires_grad_()
    logps = token_logprobs(logits, torch.tensor([2, 2]), rows=torch.tensor([0, 0]))
    grad = torch.autograd.grad(logps.sum(), logits)[0]
    assert grad[0, 2].item() == pytest.approx(2 * 3 * 2.718281828**-40, rel=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_losses_of_shared_rows(options):
    """`rpo_loss` and `linear_rpo_loss` with rows: the loss and gradients of the copied rows."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(9, 16, generator=generator, requires_grad=True)
    weight = torch.randn(33, 16, generator=generator, requires_grad=True)
    rows, labels = torch.tensor([1, 2, 1, 1, 4, 5, 8, 8]), torch.tensor([3, 4, 3, 5, 6, 7, 8, 9])
    given = dict(
        cu_seqlens=torch.tensor([0, 2, 3, 6, 8]),
        objective=RPO(beta=0.5),
        ref_logps=torch.tensor([-5.0, -3.0, -9.0, -6.0]),
        **options,
    )
    rewards = torch.tensor([1.0, -1.0, 0.5, 2.0])
    expected = rpo_loss((hidden @ weight.T)[rows], labels, rewards, **given)
    for output in (
        rpo_loss(hidden @ weight.T, labels, rewards, rows=rows, **given),
        linear_rpo_loss(hidden, weight, labels, rewards, rows=rows, **given),
    ):
        for name in ("loss", "logps", "group_losses", "margin"):
            torch.testing.assert_close(getattr(output, name), getattr(expected, name), msg=name)
        torch.testing.assert_close(
            torch.autograd.grad(output.loss, (hidden, weight), retain_graph=True),
            torch.autograd.grad(expected.loss, (hidden, weight), retain_graph=True),
        )


def test_reference_logits_share_rows_too():
    logits, labels, rows = problem(torch.float32)
    given = dict(cu_seqlens=torch.tensor([0, 4, 7, 9, 12]))
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0])
    shared = rpo_loss(logits, labels, rewards, ref_logits=logits.flip(1), rows=rows, **given)
    copied = rpo_loss(logits[rows], labels, rewards, ref_logits=logits.flip(1)[rows], **given)
    torch.testing.assert_close(shared.loss, copied.loss)


def test_operator_is_well_behaved():
    logits, labels, rows = problem(torch.float32)
    logits.requires_grad_()
    options = dict(logit_scale=1.5, softcap=3.0, temperature=0.7, ignore_index=-100, shift=False, backend="torch")
    operators, arguments = torch.ops.rpo_kernels, (logits, labels, rows)
    for outputs in ([], ["is_top1"], list(STATISTICS)):
        given = dict(options, inplace_backward=False, outputs=outputs)
        torch.library.opcheck(operators.shared_token_logprobs, arguments, given)
    *saved, _ = (x.detach() for x in operators.shared_token_logprobs(*arguments, **given))
    for grad_entropy in (None, torch.ones(12)):
        inputs = (logits.detach(), labels, rows, saved, torch.ones(12), grad_entropy)
        torch.library.opcheck(operators.shared_token_logprobs_grad, inputs, options)
        torch.library.opcheck(operators.shared_token_logprobs_grad_, inputs, options)
    compiled = torch.compile(lambda x: token_logprobs(x, labels, rows=rows), fullgraph=True, backend="aot_eager")
    logps = token_logprobs(logits, labels, rows=rows)
    torch.testing.assert_close(compiled(logits), logps)
    torch.testing.assert_close(gradient(logits, compiled(logits)), gradient(logits, logps))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(shift=True), "shift"),
        (dict(rows=torch.tensor([0])), r"one shape \[N\]"),
        (dict(rows=torch.zeros(12)), "int64 or int32"),
        (dict(rows=torch.full((12,), 7)), r"rows must lie in \[0, 7\)"),
        (dict(labels=torch.full((12,), 33)), "labels must lie"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    logits, labels, rows = problem(torch.float32)
    arguments = dict(labels=labels, rows=rows) | changes
    with pytest.raises(ValueError, match=message):
        token_logprobs(logits, **arguments)
    if "labels" not in changes:
        with pytest.raises(ValueError, match=message):
            linear_token_logprobs(logits, torch.randn(40, 33), **arguments)


def test_inplace_backward_tells_other_readers():
    logits, labels, rows = problem(torch.float32)
    used = logits.requires_grad_() * 1
    other = used.square().sum()
    logps = token_logprobs(used, labels, rows=rows, inplace_backward=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (logps.sum() + other).backward()
