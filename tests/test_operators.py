"""The operators under torch's machinery: opcheck, torch.compile, autocast, checkpointing, accumulation, counting."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rpo_kernels import RPO, rpo_loss, token_logprobs

OPS = torch.ops.rpo_kernels
OPTIONS = dict(logit_scale=1.0, softcap=None, temperature=1.0, ignore_index=-100, shift=True)


def make(device="cpu", dtype=torch.float32, vocab=90):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, generator=generator).to(device, dtype)
    weight = torch.randn(vocab, 16, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.randint(vocab, (4, 6), generator=generator)
    labels[:, 1] = -100
    rewards = torch.randn(4, generator=generator)
    ref = -torch.rand(4, generator=generator)
    return hidden, weight, labels.to(device), rewards.to(device), ref.to(device)


def loss_of(hidden, weight, labels, rewards, ref, backend, **options):
    return rpo_loss(hidden @ weight.T, labels, rewards, ref_logps=ref, shift=True, backend=backend, **options).loss


@pytest.mark.parametrize("outputs", [[], ["entropy"], ["entropy", "mean_logit", "is_top1", "log_sum_sq_probs"]])
@pytest.mark.parametrize("inplace", [False, True])
def test_opcheck(backend, backend_device, inplace, outputs):
    hidden, weight, labels, *_ = make(backend_device)
    hidden, labels = hidden[:2], labels[:2]  # opcheck runs the operator many times
    logits = (hidden @ weight.T).detach().requires_grad_()
    options = dict(OPTIONS, inplace_backward=inplace, outputs=outputs, backend=backend)
    torch.library.opcheck(OPS.token_logprobs, (logits, labels), options)


@pytest.mark.parametrize("name", ["token_logprobs_grad", "token_logprobs_grad_"])
def test_opcheck_of_the_gradient(backend, backend_device, name):
    hidden, weight, labels, *_ = make(backend_device)
    hidden, labels = hidden[:2], labels[:2]
    logits = (hidden @ weight.T).detach()
    options = dict(OPTIONS, backend=backend)
    *saved, _ = OPS.token_logprobs(logits, labels, **options, inplace_backward=False, outputs=["entropy"])
    for grad_entropy in (None, torch.ones_like(saved[0])):
        inputs = (logits, labels, saved, torch.ones_like(saved[0]), grad_entropy)
        torch.library.opcheck(getattr(OPS, name), inputs, options)


ARGUMENTS = {
    "transposed logits": lambda x, y: (x.transpose(0, 1).contiguous().transpose(0, 1), y),
    "vocabulary first": lambda x, y: (x.permute(2, 0, 1).contiguous().permute(1, 2, 0), y),
    "sliced logits": lambda x, y: (x[:, :-1, 3:], y[:, 1:].clamp(max=20)),
    "int32 labels": lambda x, y: (x, y.int()),
    "transposed labels": lambda x, y: (x, y.t().contiguous().t()),
    "no rows": lambda x, y: (x[:0], y[:0]),
    "one column": lambda x, y: (x[..., :1], y.clamp(max=0)),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
@pytest.mark.parametrize("name", ["native", "torch"])
def test_opcheck_of_every_kind_of_argument(name, kind, available_backend):
    backend, device = available_backend(name)
    hidden, weight, labels, *_ = make(device)
    logits, labels = ARGUMENTS[kind]((hidden @ weight.T).detach(), labels)
    options = dict(OPTIONS, softcap=5.0, temperature=0.7, shift=False, backend=backend)
    outputs = ["entropy", "mean_logit", "is_top1", "log_sum_sq_probs"]
    forward = dict(options, inplace_backward=False, outputs=outputs)
    logits = logits.requires_grad_()
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.token_logprobs, (logits, labels), forward, test_utils=checks)
    logps, *saved, _ = OPS.token_logprobs(logits.detach(), labels, **forward)
    inputs = (logits.detach(), labels, [logps, *saved], torch.ones_like(logps), torch.ones_like(logps))
    torch.library.opcheck(OPS.token_logprobs_grad, inputs, options, test_utils=checks)
    torch.library.opcheck(OPS.token_logprobs_grad_, inputs, options, test_utils=checks)


def test_opcheck_of_the_fused_objective(available_backend):
    _, device = available_backend("triton")
    *_, labels, rewards, ref = make(device)
    logps = -torch.rand(labels.shape).to(device).requires_grad_()
    family = dict(distance="bwd_kl", beta=0.1, eta=1.0, gamma=0.0, target_margin=None, length_normalize=True)
    for weights, offsets, index, structure in [
        (None, None, None, [4, 2, 2, 2, 1]),
        (
            torch.rand(labels.shape).to(device),
            None,
            torch.tensor([[0, 2, 3], [1, -1, -1]], device=device),
            [4, 2, 3, 0, 0],
        ),
    ]:
        arguments = (logps, labels, rewards, ref, None, weights, offsets, index)
        options = dict(family, structure=structure, ignore_index=-100, shift=True)
        torch.library.opcheck(OPS.rpo_reduce, arguments, options, atol=1e-5, rtol=1e-5)
        gradients = [torch.rand((), device=device), torch.rand(2, device=device), torch.rand(4, device=device)]
        inputs = (*gradients, OPS.rpo_reduce(*arguments, **options)[-1], labels, weights, offsets, index)
        torch.library.opcheck(OPS.rpo_reduce_grad, inputs, dict(structure=structure))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layout", ["padded", "packed", "ragged"])
def test_compiles_to_one_graph(backend, backend_device, layout, inplace):
    hidden, weight, labels, rewards, ref = make(backend_device)
    options = dict(inplace_backward=inplace, backend=backend)
    if layout == "packed":
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        options["cu_seqlens"] = torch.tensor([0, 6, 12, 18, 24], device=backend_device)
    if layout == "ragged":
        options["group_ids"] = [0, 1, 1, 1]

    def step(hidden, weight):
        return loss_of(hidden, weight, labels, rewards, ref, **options)

    torch._dynamo.reset()
    expected = step(hidden, weight)
    (expected_grad,) = torch.autograd.grad(expected, weight)
    loss = torch.compile(step, fullgraph=True)(hidden, weight)
    (grad,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


def test_group_ids_in_a_tensor_break_the_graph():
    hidden, weight, labels, rewards, ref = make()
    ids = torch.tensor([0, 1, 1, 1])

    def step(hidden, ids):
        return loss_of(hidden, weight, labels, rewards, ref, "torch", group_ids=ids)

    for fullgraph in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=fullgraph, backend="eager")
        if fullgraph:
            with pytest.raises(RuntimeError, match="group_ids must be a list in a graph"):
                compiled(hidden, ids)
        else:
            torch.testing.assert_close(compiled(hidden, ids), step(hidden, [0, 1, 1, 1]))


def test_autocast_keeps_losses_in_float32(backend, backend_device):
    hidden, weight, labels, rewards, ref = make(backend_device)
    with torch.autocast(backend_device, torch.bfloat16):
        logits = hidden @ weight.T
        assert logits.dtype == torch.bfloat16
        out = rpo_loss(logits, labels, rewards, ref_logps=ref, shift=True, backend=backend)
    out.loss.backward()
    exact = rpo_loss(logits.double().detach(), labels, rewards, ref_logps=ref, shift=True, backend="torch")
    assert out.loss.dtype == torch.float32
    torch.testing.assert_close(out.loss.double(), exact.loss, rtol=1e-5, atol=1e-6)
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_activation_checkpointing(backend, backend_device, inplace):
    arguments = make(backend_device)
    weight = arguments[1]
    (expected,) = torch.autograd.grad(loss_of(*arguments, backend), weight)
    loss = checkpoint(loss_of, *arguments, backend, inplace_backward=inplace, use_reentrant=False)
    (grad,) = torch.autograd.grad(loss, weight)
    assert torch.equal(grad, expected)


def test_gradient_accumulation(backend, backend_device):
    hidden, weight, labels, rewards, ref = make(backend_device)
    loss_of(hidden, weight, labels, rewards, ref, backend).backward()
    whole, weight.grad = weight.grad, None
    for half in (slice(0, 2), slice(2, 4)):
        loss = loss_of(hidden[half], weight, labels[half], rewards[half], ref[half], backend, inplace_backward=True)
        (loss / 2).backward()
    torch.testing.assert_close(weight.grad, whole)


def test_no_second_derivative(backend, backend_device):
    hidden, weight, labels, *_ = make(backend_device)
    logps = token_logprobs(hidden @ weight.T, labels, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_no_gradient_asked_for(backend, backend_device):
    hidden, weight, labels, rewards, ref = make(backend_device)
    with torch.no_grad():
        assert not loss_of(hidden, weight, labels, rewards, ref, backend).requires_grad


class LargestNewTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor whose memory an operator newly allocates."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(x)}
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in inputs:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("name", ["native", "triton"])
def test_inplace_loss_allocates_under_a_percent_of_the_logits(name, available_backend):
    """Every tensor that forward and backward allocate is counted; the kernels allocate through torch alone."""
    backend, device = available_backend(name)
    vocab = 8192
    logits = torch.randn(4, 6, vocab, device=device).requires_grad_()
    source = logits * 1
    labels = torch.randint(vocab, (4, 6), device=device)
    rewards, ref = torch.randn(4, device=device), torch.randn(4, device=device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with LargestNewTensor() as counted:
        out = rpo_loss(source, labels, rewards, ref_logps=ref, objective=RPO(), inplace_backward=True, backend=backend)
        (grad,) = torch.autograd.grad(out.loss, source)
    assert grad.data_ptr() == source.data_ptr()
    assert 0 < counted.bytes < 0.01 * source.nbytes
    if device == "cuda":
        assert torch.cuda.max_memory_allocated() - before < 0.01 * source.nbytes
