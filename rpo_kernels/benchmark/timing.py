"""From implementations to samplers: each is loaded, checked against float64 and warmed up, here or in another checkout.

A checkout of another commit is measured by a process that imports its kernels and this benchmark (`compare` puts it
there): it loads in the same way, and then answers every name on its standard input with one sample.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .clock import free_memory
from .implementations.catalogue import find_one
from .implementations.registry import Implementation, Pass
from .inputs import Inputs
from .peaks import failures_in, tree_environment
from .problem import Problem
from .references import make_references
from .results import Result
from .sampling import Sample, Sampler, preserved
from .truth import Truth, find_truth, verdict

_START_SECONDS = 180  # limit of an implementation's compilation
_TRUTH_FLOPS = {"cpu": 5e10}  # of the float64 check; on a GPU the whole problem is checked


class Loaded(NamedTuple):
    """Implementations ready to be timed."""

    results: dict[str, Result]  # of all: errors, `status` and `reason`
    samplers: dict[str, Callable[[], Sample]]  # of those that are right
    facts: dict[str, Any]  # for the problem's entry: `references`, `checked_rows`


def load(problem: Problem, implementations: list[Implementation], states: Path | None) -> Loaded:
    """Load the implementations in this process.

    Raises:
        DeviceLost: if one left the GPU unusable.
    """
    if problem.device == "cpu":
        torch._dynamo.reset()
    small = problem.small(_TRUTH_FLOPS.get(problem.device, 3e14))
    small_inputs = Inputs.make(small, states)
    truth = find_truth(small_inputs)
    inputs = small_inputs if small == problem else Inputs.make(problem, states)
    references = make_references(problem)
    loaded = Loaded({}, {}, {"references": {n: r.facts for n, r in references.items()}, "checked_rows": small.rows})
    for one in implementations:
        result = loaded.results[one.name] = {"status": "failed", "reason": None}
        with failures_in(result, problem.device, _START_SECONDS):
            run = one.load(problem)
            result["errors"] = check(run, small_inputs, truth, one.inplace)
            result.update(verdict(result["errors"], small, one.approximate))
            if result["status"] == "ok":
                sampler = Sampler(run, inputs, references, one.inplace)
                sampler()  # compiled, for these sizes
                loaded.samplers[one.name] = sampler
    return loaded


def check(run: Pass, inputs: Inputs, truth: Truth, inplace: bool) -> dict[str, float]:
    """Errors against float64."""
    with preserved(inputs, inplace):
        outcome = run.forward(inputs)
        loss, logps = run.results(inputs, outcome)
        grads = run.backward(inputs, outcome) if inputs.leaves else {}
        return truth.errors(loss, logps, grads)


class Worker:
    """A process that times implementations of another checkout."""

    def __init__(self, tree: str, problem: Problem, implementations: list[Implementation], states: Path | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from rpo_kernels.benchmark.timing import work; work()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tree, env=tree_environment(tree),
        )  # fmt: skip
        names = [one.name for one in implementations]
        results, facts = self._ask([problem._asdict(), names, states and str(states)])
        right = [name for name in names if results[name]["status"] == "ok"]
        self.loaded = Loaded(results, {name: self._sampler(name) for name in right}, facts)

    def _sampler(self, name: str) -> Callable[[], Sample]:
        return lambda: Sample(*self._ask(name))

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("> "):
                return json.loads(line[2:])
        raise RuntimeError(f"the process that times the other checkout ended with {self._process.wait()}")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def work() -> None:
    """The worker's process."""
    fields, names, states = json.loads(sys.stdin.readline())
    problem = Problem(**fields)
    implementations = [find_one(problem.kind.source, name) for name in names]
    loaded = load(problem, implementations, None if states is None else Path(states))
    print("> " + json.dumps([loaded.results, loaded.facts]), flush=True)
    for line in sys.stdin:
        print("> " + json.dumps(loaded.samplers[json.loads(line)]()), flush=True)
        free_memory(problem.device)
