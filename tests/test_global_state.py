"""Nothing depends on torch's global state: its default dtype, default device, another device's autocast."""

import ast
import functools
from pathlib import Path

import pytest
import torch

from fuzz.contexts import default_dtype
from rpo_kernels import DPO, IPO, RPO, linear_rpo_loss, rpo_loss, score_loss, token_logprobs


def make(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(4, 5, 40, generator=generator), torch.randint(40, (4, 5), generator=generator)]
    tensors += [torch.randn(4, generator=generator), -torch.rand(4, 5, generator=generator)]
    tensors += [torch.randn(4, 5, 8, generator=generator), torch.randn(40, 8, generator=generator)]
    tensors = [x.to(device) for x in tensors]
    return [x.requires_grad_() if i in (0, 4, 5) else x for i, x in enumerate(tensors)]


def everything(backend, logits, labels, rewards, ref, hidden, weight):
    """Every kind of result, as one flat list of tensors."""
    results = []
    for objective in (RPO(), DPO(), IPO(), RPO("fwd_kl", target_margin=0.5), RPO("sq", length_normalize=True)):
        for groups in (dict(num_responses=2), dict(group_ids=[0, 1, 1, 1])):
            options = dict(ref_logps=ref, objective=objective, backend=backend, **groups)
            out = rpo_loss(logits, labels, rewards, **options)
            results += [*out[:7], *torch.autograd.grad(out.loss, logits)]
    out = linear_rpo_loss(hidden, weight, labels, rewards, ref_logps=ref, memory_budget=2**20, backend=backend)
    results += [*out[:7], *torch.autograd.grad(out.loss, [hidden, weight])]
    results += [score_loss(ref.sum(-1), rewards, group_ids=[3, 3, 3, 1], backend=backend).loss]
    outputs = token_logprobs(
        logits, labels, outputs=("entropy", "mean_logit", "is_top1", "log_sum_sq_probs"), backend=backend
    )
    return [*results, *outputs[:5]]


@functools.cache
def plain_results(backend, device):
    """In the usual state, with their inputs."""
    inputs = make(device)
    return inputs, everything(backend, *inputs)


STATES = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "meta": lambda: torch.device("meta"),
    "autocast of another device": lambda: torch.autocast("mps", torch.float16),
}


@pytest.mark.filterwarnings("ignore:.*autocast:UserWarning")
@pytest.mark.parametrize("state", STATES)
def test_global_state_changes_nothing(backend, backend_device, state):
    inputs, expected = plain_results(backend, backend_device)
    with STATES[state]():
        results = everything(backend, *inputs)
    for result, exact in zip(results, expected, strict=True):
        assert result.dtype == exact.dtype and torch.equal(result, exact)


FACTORIES = {"empty", "zeros", "ones", "full", "tensor", "rand", "randn", "eye", "linspace"}


def test_every_new_tensor_names_its_dtype_and_device():
    """A float32 kernel that writes into memory of the default dtype writes past its end."""
    package = Path(__file__).parents[1] / "rpo_kernels"
    files = [
        *package.glob("*.py"),
        *(x for part in ("kernels", "head", "fused", "objectives") for x in (package / part).rglob("*.py")),
    ]
    names = {f"torch.{name}" for name in FACTORIES}
    calls = [
        (file, node) for file in files for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)
    ]
    unnamed = [
        f"{file.name}:{call.lineno} {ast.unparse(call)}"
        for file, call in calls
        if ast.unparse(call.func) in names and not {"dtype", "device"} <= {keyword.arg for keyword in call.keywords}
    ]
    assert unnamed == []
