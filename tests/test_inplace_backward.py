"""inplace_backward under everything that can read the logits a second time: the exact gradient, or autograd's error."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from rpo_kernels import rpo_loss, token_logprobs

MODIFIED = "modified by an inplace operation"


def make(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(4, 6, 8, generator=generator)
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    labels = torch.randint(40, (4, 6), generator=generator)
    return hidden, weight, labels, torch.randn(4, generator=generator), -10 * torch.rand(4, generator=generator)


def loss_of(hidden, weight, labels, rewards, ref, inplace=True, beside=True):
    """The loss, beside another operator that saves the same logits if `beside`."""
    logits = hidden @ weight.T
    other = logits.logsumexp(-1).square().mean() if beside else 0  # created first, so that its backward comes last
    return other + rpo_loss(logits, labels, rewards, ref_logps=ref, inplace_backward=inplace).loss


def exact_grad(beside=True):
    arguments = make()
    return torch.autograd.grad(loss_of(*arguments, inplace=False, beside=beside), arguments[1])[0]


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_another_reader_raises_compiled_or_not(compiler):
    arguments = make()
    torch._dynamo.reset()
    step = torch.compile(loss_of, backend=compiler)
    with pytest.raises(Exception, match=MODIFIED):
        torch.autograd.grad(step(*arguments), arguments[1])


def kept_as_it_is():
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)


@pytest.mark.parametrize("hooks", [kept_as_it_is, torch.autograd.graph.save_on_cpu])
def test_hooks_for_saved_tensors(hooks):
    arguments = make()
    with hooks():
        loss = loss_of(*arguments)
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, arguments[1], retain_graph=True)
        torch.testing.assert_close(grad, exact_grad())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_gives_the_gradient_or_raises(use_reentrant):
    arguments = make()
    arguments[0].requires_grad_()
    loss = checkpoint(loss_of, *arguments, use_reentrant=use_reentrant)
    if use_reentrant:  # recomputes with ordinary saved tensors
        with pytest.raises(RuntimeError, match=MODIFIED):
            loss.backward()
    else:
        loss.backward()
        torch.testing.assert_close(arguments[1].grad, exact_grad())


def test_second_backward_and_double_backward_raise():
    arguments = make()
    loss = loss_of(*arguments, beside=False)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=MODIFIED):
        loss.backward()
    arguments = make()
    (grad,) = torch.autograd.grad(loss_of(*arguments, beside=False), arguments[1], create_graph=True)
    torch.testing.assert_close(grad, exact_grad(beside=False))
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_the_gradient_is_a_constant():
    hidden, weight, labels, *_ = make()
    logits, seen = hidden @ weight.T, []
    logits.register_hook(lambda grad: seen.append(grad.requires_grad))
    (grad,) = torch.autograd.grad(token_logprobs(logits, labels, inplace_backward=True).sum(), logits)
    assert seen == [False] and not grad.requires_grad and grad.data_ptr() == logits.data_ptr()


def test_rows_that_share_memory_are_refused():
    labels = torch.zeros(4, dtype=torch.long)
    for size, stride in [((4, 10), (0, 1)), ((4, 10), (5, 1)), ((4, 10), (9, 1)), ((4, 10), (1, 1))]:
        logits = torch.randn(100).as_strided(size, stride).requires_grad_()
        with pytest.raises(ValueError, match="rows do not share memory"):
            token_logprobs(logits, labels, inplace_backward=True)
    for x in (torch.randn(4, 20)[:, ::2], torch.randn(10, 4).T, torch.randn(8, 10)[::2], torch.randn(4, 10)):
        leaf = x.requires_grad_()
        (exact,) = torch.autograd.grad(token_logprobs(leaf, labels).sum(), leaf)
        (grad,) = torch.autograd.grad(token_logprobs(leaf, labels, inplace_backward=True).sum(), leaf)
        torch.testing.assert_close(grad, exact)
