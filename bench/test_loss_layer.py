"""Every provider, evaluation and training pass, at both levels: `pytest bench/ --benchmark-only`.

A provider that cannot run here is skipped with the reason; one that is wrong by the float64 definition fails.
`rpo-kernels bench` measures the same registry at real sizes, with memory.
"""

import pytest
import torch

from rpo_kernels.benchmark.bench import check, verdict
from rpo_kernels.benchmark.problem import Inputs, Problem, find_truth, sequences_of
from rpo_kernels.benchmark.providers import Unavailable, providers
from rpo_kernels.benchmark.timing import preserved

KINDS = {"logits": "logits", "head": "head", "frozen": "head"}
CASES = [(kind, provider) for kind, level in KINDS.items() for provider in providers(level)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}: {case[1].name}")
def loaded(request):
    """Kind, provider, its function and inputs, once it is known to be right."""
    kind, provider = request.param
    option = request.config.getoption
    sequences, length = sequences_of(option("--rows"), option("--responses"))
    level, hidden = KINDS[kind], 0 if kind == "logits" else option("--hidden")
    sizes = (sequences, length, option("--vocab"), hidden, option("--responses"), option("--dtype"), option("--device"))
    problem = Problem(level, "bench", *sizes, frozen=kind == "frozen")
    torch._dynamo.reset()
    try:
        run = provider.load(problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    inputs = Inputs.make(problem)
    outcome = verdict(check(run, inputs, find_truth(inputs), provider.inplace), problem, provider.approximate)
    assert outcome["status"] == "ok", outcome["reason"]
    return kind, provider, run, inputs


def wait(inputs: Inputs) -> None:
    if inputs.problem.device != "cpu":
        torch.cuda.synchronize()


def test_evaluation(loaded, benchmark):
    """Loss without gradients."""
    kind, _, run, inputs = loaded
    benchmark.group = f"{kind}: evaluation"

    @torch.no_grad()
    def evaluate():
        run(inputs)
        wait(inputs)

    benchmark.pedantic(evaluate, rounds=5, warmup_rounds=1)


def test_training(loaded, benchmark):
    """Loss and gradients."""
    kind, provider, run, inputs = loaded
    benchmark.group = f"{kind}: forward and backward"

    def train():
        loss, _ = run(inputs)
        torch.autograd.grad(loss, list(inputs.leaves.values()))
        wait(inputs)

    with preserved(inputs, provider.inplace):
        benchmark.pedantic(train, rounds=5, warmup_rounds=1)
