"""Every implementation of every case: `pytest bench/ --benchmark-only`.

One that cannot run here is skipped with the reason; one that disagrees with the float64 reference fails. `rpo-kernels
bench` measures the same ones at real sizes, with memory.
"""

import pytest
import torch

from rpo_kernels.benchmark.allocations import run_step
from rpo_kernels.benchmark.implementations.catalogue import find
from rpo_kernels.benchmark.implementations.registry import Unavailable
from rpo_kernels.benchmark.inputs import Inputs
from rpo_kernels.benchmark.problem import CASES, Problem, sequences_of
from rpo_kernels.benchmark.sampling import preserved
from rpo_kernels.benchmark.timing import check
from rpo_kernels.benchmark.truth import find_truth, verdict

PAIRS = [(case, one) for case, kind in CASES.items() for one in find(kind.source)]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}: {pair[1].name}")
def loaded(request):
    """An implementation, ready to run, and its inputs, once it is known to be right."""
    case, one = request.param
    option = request.config.getoption
    sequences, length = sequences_of(option("--rows"), option("--responses"))
    hidden = option("--hidden") if CASES[case].source == "head" else 0
    sizes = (sequences, length, option("--vocab"), hidden, option("--responses"), option("--dtype"), option("--device"))
    problem = Problem(case, "bench", *sizes)
    torch._dynamo.reset()
    try:
        run = one.load(problem)
    except Unavailable as reason:
        pytest.skip(str(reason))
    inputs = Inputs.make(problem)
    outcome = verdict(check(run, inputs, find_truth(inputs), one.inplace), problem, one.approximate)
    assert outcome["status"] == "ok", outcome["reason"]
    return one, run, inputs


def test_step(loaded, benchmark):
    """A forward pass and, where the case has one, a backward pass."""
    one, run, inputs = loaded
    benchmark.group = inputs.problem.case

    def step():
        run_step(run, inputs)
        if inputs.problem.device != "cpu":
            torch.cuda.synchronize()

    with preserved(inputs, one.inplace):
        benchmark.pedantic(step, rounds=5, warmup_rounds=1)
