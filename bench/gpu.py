"""What `make gpu` runs: a probe, tests, benchmarks, tuning and memory on this machine's GPU, in under nine minutes.

Needs nothing but what is installed. Results go to bench/results/<device>/ and, after each step, into one archive beside
it; `bench/notes/predictions-h200.md` is what they are to be held against. A run that was interrupted, or ran out of
time, is continued by the next one, which skips what is done.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from rpo_kernels.benchmark.machine import describe_machine, device_slug, same_setup
from rpo_kernels.benchmark.results import save_json

TOTAL_SECONDS = 8.5 * 60
GRACE_SECONDS = 8  # for a step that is out of time to write down what it found
_CLI = ["-m", "rpo_kernels.cli"]
_PARALLEL = ["-n", "8"] if importlib.util.find_spec("xdist") else []
_DEVICE_LOST = 3  # exit status of a benchmark that can go on in a new process


class Step(NamedTuple):
    """One command, the most it may take, and its name in the record of what is done."""

    name: str
    seconds: int
    arguments: list[str]


def _bench(name: str, arguments: str, seconds: int = 150) -> Step:
    title = f"bench {name} {arguments}"
    return Step(title, seconds, [*_CLI, "bench", "--resume", "--name", name, *arguments.split()])


_KERNEL_TESTS = (
    *("rows", "logprobs", "triton_rows", "triton_sequences"),
    *("head", "head_filter", "head_exactness", "head_evaluation", "head_gemm"),
)
_PARTS, _HOST_COSTS = (str(Path(__file__).parent / name) for name in ("gpu_parts.py", "host_costs.py"))


def _tests(name: str, seconds: int, arguments: list[str]) -> Step:
    """Failures are listed whatever happens."""
    return Step(name, seconds, ["-m", "pytest", "-q", "-rfE", "--maxfail=20", *_PARALLEL, *arguments])


# In the order of what is most wanted, should the time end: what the device does, the kernels' tests, the head and the
# logits of three models, constants, then the rest.
STEPS = [
    Step("probe", 40, [_PARTS, "probe"]),
    _tests(
        "kernel tests",
        90,
        ["-m", "not real and not slow", "-k", "not interpreted", *[f"tests/test_{name}.py" for name in _KERNEL_TESTS]],
    ),
    *[
        _bench("shapes", f"--model {model} --case head logits --seconds 3", 60)
        for model in ("llama-3.1-8b", "gemma-3-270m", "qwen2.5-0.5b")
    ],
    Step("evaluate", 30, [_PARTS, "evaluate"]),
    Step("host costs", 30, [_HOST_COSTS]),
    Step("tune", 90, [_PARTS, "tune"]),
    _bench("shapes", "--model llama-3.1-8b --case head-frozen head-eval --seconds 3", 60),
    Step("memory", 60, [*_CLI, "memory", "--model", "llama-3.1-8b", "--responses", "4", "--length", "2048"]),
    _bench("rows", "--model llama-3.1-8b --case head --rows 2048 8192 32768 131072 --seconds 2 --only rpo_kernels", 90),
    _bench("vocab", "--model llama-3.1-8b --case logits --vocab 32000 65536 128256 262144 --seconds 2", 90),
    _bench("shapes", "--model gemma-2-2b --case head logits"),
    _bench("shapes", "--model llama-3.1-8b --case rows logits-eval"),
    _bench("shapes", "--model qwen2.5-7b"),
    _tests("other tests", 150, ["-m", "not real", "tests"]),
]


def main() -> int:
    """Run the steps that are not done, in order, while the time lasts. Returns the exit status."""
    if not torch.cuda.is_available():
        print("make gpu: no GPU is available")
        return 1
    machine = describe_machine("cuda")
    folder = Path("bench/results") / device_slug(machine)
    record = folder / "done.json"
    done = _read(record, machine)
    deadline = time.monotonic() + TOTAL_SECONDS
    for step in STEPS:
        if done["steps"].get(step.name) == 0:
            continue
        left = deadline - time.monotonic()
        if left < 20:
            print("make gpu: out of time; run it again for the rest")
            break
        done["steps"][step.name] = run(step, min(left, step.seconds), folder)
        save_json(done, record)
        archive(folder)
    open_steps = [step.name for step in STEPS if done["steps"].get(step.name) != 0]
    print("\n".join([f"results: {folder}", *(f"not finished: {name}" for name in open_steps)]))
    return 1 if open_steps else 0


def archive(folder: Path) -> Path:
    """All results so far in one file beside their folder."""
    packed = folder.with_suffix(".tar.gz")
    with tarfile.open(packed, "w:gz") as file:
        file.add(folder, folder.name)
    return packed


def run(step: Step, seconds: float, folder: Path) -> int:
    """Run one step, its output shown and kept in a log; returns its exit status, 124 if it was out of time."""
    out = []
    if "rpo_kernels.cli" in step.arguments:
        out = ["--out", "bench/results"]
    elif {_PARTS, _HOST_COSTS} & {*step.arguments}:
        out = ["--out", str(folder)]
    deadline = time.monotonic() + seconds
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "log.txt"
    print(f"== {step.name}", flush=True)
    while True:
        left = max(1.0, deadline - time.monotonic())
        output, status = _run([sys.executable, *step.arguments, *out], left)
        print(output, flush=True)
        with log.open("a") as file:
            file.write(f"== {step.name}: exit status {status}\n{output}\n")
        if status != _DEVICE_LOST or "bench" not in step.arguments:
            return status


def _run(command: list[str], seconds: float) -> tuple[str, int]:
    """Output and exit status. Out of time, the command is interrupted so that it writes down what it found, then
    stopped with all that it started, and the status is 124."""
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_take_interruptions,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
            return output, process.returncode
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            output, _ = process.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
        return output, 124


def _take_interruptions() -> None:
    """In the started process: SIGINT as usual, also where a shell's background has it ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _read(record: Path, machine: dict) -> dict:
    if record.exists():
        done = json.loads(record.read_text())
        if same_setup(done["machine"], machine):
            return done
    return {"machine": machine, "steps": {}}


if __name__ == "__main__":
    sys.exit(main())
