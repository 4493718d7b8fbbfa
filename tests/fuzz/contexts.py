"""What autograd can be asked to do with a function of one tensor: each gives value and gradient (or None)."""

import contextlib

import torch
from torch.utils.checkpoint import checkpoint

MODIFIED = "modified by an inplace operation"


def plain(f, x, factors):
    y = f(x)
    return y, torch.autograd.grad(y, x, factors)[0]


def repeated(f, x, factors):
    """A second backward gives the same, or raises."""
    y = f(x)
    (first,) = torch.autograd.grad(y, x, factors, retain_graph=True)
    first = first.clone()
    try:
        (second,) = torch.autograd.grad(y, x, factors)
    except RuntimeError as error:
        assert MODIFIED in str(error)
        return y, first
    assert torch.equal(first, second)
    return y, first


def accumulated(f, x, factors):
    leaf = x.detach().requires_grad_()
    for _ in range(2):
        y = f(leaf)
        y.backward(factors)
    return y, leaf.grad / 2


def differentiated_twice(f, x, factors):
    y = f(x)
    (grad,) = torch.autograd.grad(y, x, factors, create_graph=True)
    if grad.requires_grad:
        try:
            grad.sum().backward()
            raise AssertionError("a second derivative came out")
        except RuntimeError as error:
            assert "differentiable once" in str(error)
    return y, grad.detach()


def beside_another_reader(f, x, factors):
    """Another operator reads the same tensor: the exact gradient, or an error."""
    shared = x * 1
    other = shared.square().sum()
    y = f(shared)
    try:
        (grad,) = torch.autograd.grad([y, other], x, [factors, None])
    except RuntimeError as error:
        assert MODIFIED in str(error)
        return y, None
    x = x.detach()
    return y, torch.where((2 * x).isinf(), 0, grad - 2 * x)  # masked columns, whose squares give inf - inf


def under(manager):
    def run(f, x, factors):
        with manager():
            y = f(x)
        return y, torch.autograd.grad(y, x, factors)[0]

    return run


def checkpointed(use_reentrant):
    def run(f, x, factors):
        y = checkpoint(f, x, use_reentrant=use_reentrant)
        leaf = x.detach().requires_grad_()
        y = checkpoint(f, leaf, use_reentrant=use_reentrant)
        y.backward(factors)
        return y, leaf.grad

    return run


def without_grad(manager):
    def run(f, x, factors):
        with manager():
            return f(x.detach()).clone(), None

    return run


def compiled(dynamic):
    def run(f, x, factors):
        torch._dynamo.reset()
        y = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")(x)
        return y, torch.autograd.grad(y, x, factors)[0]

    return run


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def matmul_precision(name):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


QUICK = {
    "plain": plain,
    "repeated": repeated,
    "accumulated": accumulated,
    "differentiated twice": differentiated_twice,
    "beside another reader": beside_another_reader,
    "hooks": under(lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)),
    "save_on_cpu": under(torch.autograd.graph.save_on_cpu),
    "checkpoint": checkpointed(False),
    "reentrant checkpoint": checkpointed(True),
    "no_grad": without_grad(torch.no_grad),
    "inference": without_grad(torch.inference_mode),
    "autocast": under(lambda: torch.autocast("cpu", torch.bfloat16)),
    "default dtype": under(lambda: default_dtype(torch.float64)),
    "default half": under(lambda: default_dtype(torch.float16)),
    "default device": under(lambda: torch.device("meta")),
    "three threads": under(lambda: threads(3)),
    "matmul precision": under(lambda: matmul_precision("medium")),
}
# For Triton's interpreter, which takes seconds: those that it could fail apart from its kernels.
FEW = ("plain", "repeated", "differentiated twice", "accumulated", "hooks", "checkpoint")
COMPILED = {"compiled": compiled(False), "compiled dynamic": compiled(True)}
