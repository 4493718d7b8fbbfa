"""The run of a benchmark: peak memory of everything, then time, the result file rewritten after each step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .clock import free_memory
from .implementations.registry import Implementation
from .peaks import PeakSettings, measure_peaks
from .problem import Problem
from .results import Entry, begin, entry_of, failure, forget_interruption, is_pending, lacks_peak, save_json
from .sampling import LEAST, Sample, SampleError, columns, interleave
from .timing import Loaded, Worker, load


class Subject(NamedTuple):
    """What is measured under a name: an implementation, of this checkout or of another one."""

    implementation: Implementation
    tree: str | None = None  # the other checkout
    commit: str | None = None  # its name

    @property
    def name(self) -> str:
        return self.implementation.name + (f" @ {self.commit}" if self.commit else "")


class Plan(NamedTuple):
    """What to measure, and how."""

    problems: list[Problem]
    subjects: dict[str, list[Subject]]  # by source
    seconds: float  # of sampling, a problem
    limit: int | None = None  # bytes that a measured implementation may take
    states: Path | None = None  # hidden states of real text
    memory: bool = True

    def of(self, problem: Problem) -> list[Subject]:
        return self.subjects[problem.kind.source]

    @property
    def steps(self) -> int:
        return sum(self.memory * len(self.of(problem)) + 1 for problem in self.problems)


Report = Callable[[str, int], None]  # what is being done, and how many steps are done since the last call


def run(plan: Plan, data: dict[str, Any], path: Path, report: Report) -> None:
    """Measure what `data` does not hold yet.

    Raises:
        DeviceLost: if an implementation left the GPU unusable; the next run goes on without it.
    """
    on_gpu = plan.problems[0].device != "cpu"
    # On a CPU an implementation's process measures all problems; on a GPU each problem is finished before the next.
    batches = [[problem] for problem in plan.problems] if on_gpu else [plan.problems]
    with _saved(data, path):
        for batch in batches:
            torch._dynamo.reset()
            if plan.memory:
                _measure_memory(plan, batch, data, path, report)
            for problem in batch:
                report(f"time: {problem.title}", 0)
                _measure_time(plan, problem, entry_of(data, problem), lambda: save_json(data, path))
                report("", 1)
                save_json(data, path)


@contextmanager
def _saved(data: dict[str, Any], path: Path) -> Iterator[None]:
    """Saves the measurements however the block ends; one that the user interrupts counts as not begun."""
    try:
        yield
    except KeyboardInterrupt:
        for entry in data["problems"]:
            forget_interruption(entry)
        raise
    finally:
        save_json(data, path)


def _measure_memory(plan: Plan, batch: list[Problem], data: dict[str, Any], path: Path, report: Report) -> None:
    for source, subjects in plan.subjects.items():
        problems = [problem for problem in batch if problem.kind.source == source]
        for subject in subjects if problems else []:
            report(f"memory: {subject.name}", 0)
            entries = [entry_of(data, problem) for problem in problems]
            new = [(p, e) for p, e in zip(problems, entries) if lacks_peak(e["results"].get(subject.name))]
            for _, entry in new:
                begin(entry, subject.name)
            save_json(data, path)
            settings = PeakSettings(plan.limit, str(plan.states) if plan.states else None, tree=subject.tree)
            peaks = measure_peaks(subject.implementation, [p for p, _ in new], settings) if new else []
            for (_, entry), result in zip(new, peaks):
                entry["results"][subject.name] = result
            report("", len(problems))


def _measure_time(plan: Plan, problem: Problem, entry: Entry, save: Callable[[], None]) -> None:
    """Time the problem's subjects together, unless all of them have been."""
    results = entry["results"]
    right = [s for s in plan.of(problem) if is_pending(results.get(s.name)) or results[s.name]["status"] == "ok"]
    if all(s.name in results and len(results[s.name].get("step_s", [])) >= LEAST for s in right):
        return
    for subject in right:
        begin(entry, subject.name)
    save()
    with ExitStack() as workers:
        samplers: dict[str, Callable[[], Sample]] = {}
        for tree in dict.fromkeys(subject.tree for subject in right):
            subjects = [subject for subject in right if subject.tree == tree]
            loaded = _load(problem, subjects, tree, plan.states, workers)
            entry.update(loaded.facts)
            for subject in subjects:
                name = subject.implementation.name
                results[subject.name].update(loaded.results[name])
                results[subject.name].pop("attempts")
                if name in loaded.samplers:
                    samplers[subject.name] = loaded.samplers[name]
        _sample(samplers, entry, plan.seconds, problem.device)
    free_memory(problem.device)


def _load(
    problem: Problem, subjects: list[Subject], tree: str | None, states: Path | None, workers: ExitStack
) -> Loaded:
    """The subjects of one checkout ready to be timed, those of another one in a process that `workers` ends."""
    implementations = [subject.implementation for subject in subjects]
    if tree is None:
        return load(problem, implementations, states)
    return workers.enter_context(closing(Worker(tree, problem, implementations, states))).loaded


def _sample(samplers: dict[str, Callable[[], Sample]], entry: Entry, seconds: float, device: str) -> None:
    """Time the implementations; if one fails, it is left out and the others are timed again. Samples of an interrupted
    run are kept, for `--resume` to replace."""
    taken: dict[str, list[Sample]] = {}
    try:
        interleave(samplers, seconds, taken)
    except SampleError as error:
        name, message = error.args
        entry["results"][name].update(failure(message))
        free_memory(device)
        taken.clear()
        _sample({n: sampler for n, sampler in samplers.items() if n != name}, entry, seconds, device)
    finally:
        for name, samples in taken.items():
            entry["results"][name].update(columns(samples))
