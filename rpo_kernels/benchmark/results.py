"""The result file: JSON, one for each run, in a folder for each device.

    {"schema": 2, "kind": "bench" | "memory" | ..., "machine": {...},
     "problems": [{"title", "problem": {...}, "references": {"gemm": {"dtype", "flops"}, ...}, "checked_rows",
                   "results": {implementation: RESULT}, "predicted": {implementation: bytes by part}}]}

RESULT is `status` (ok, wrong, unavailable, out of memory, failed, interrupted) and `reason`; where they could be
measured `peak_bytes` (beyond `input_bytes`), `errors` (against float64), and every sample's seconds: `step_s` (forward
and backward), `forward_s` (its part, if known) and, by reference, `reference_s`. `kind` "memory" adds `parts`, what the
peak was made of. Comparisons of training runs in bench/ (`kind` "training", "trl", "shared prompts") hold `settings`,
and `runs` by name in place of problems.
"""

import json
import re
import statistics
from pathlib import Path
from typing import Any

from .._files import write_whole
from .machine import device_slug, differences
from .problem import Problem

SCHEMA = 2
Entry = dict[str, Any]
Result = dict[str, Any]
INTERRUPTED = "the run ended while this was measured"
_OUT_OF_MEMORY = re.compile("out of memory|can't allocate|cannot allocate|not enough memory|bad_alloc|MemoryError")


def result_path(out: Path, machine: dict[str, Any], name: str) -> Path:
    """Where results go: a folder for the device, a file for the run."""
    return out / device_slug(machine) / f"{name}.json"


def new_results(kind: str, machine: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "kind": kind, "machine": machine, "problems": []}


def save_json(data: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


def load_json(path: Path) -> dict[str, Any]:
    """Results of a file.

    Raises:
        ValueError: if the file is not one that this version has written, naming it.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a whole JSON file ({error}); delete it or choose another --name") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not in this version's format; delete it or choose another --name")
    return data


def resume(path: Path, kind: str, machine: dict[str, Any]) -> dict[str, Any]:
    """The earlier results of a file to continue, or new ones if it does not exist.

    Raises:
        ValueError: if the file is damaged, or of another kind or setup.
    """
    if not path.exists():
        return new_results(kind, machine)
    data = load_json(path)
    if data["kind"] != kind:
        raise ValueError(f"{path} holds results of kind {data['kind']!r}, not {kind!r}")
    if changed := differences(data["machine"], machine):
        raise ValueError(f"{path} cannot be resumed, the setup differs: {'; '.join(changed)}")
    return data


def entry_of(data: dict[str, Any], problem: Problem) -> Entry:
    """The problem's entry, made if there is none."""
    for entry in data["problems"]:
        if entry["problem"] == problem._asdict():
            return entry
    entry = {"title": problem.title, "problem": problem._asdict(), "results": {}}
    data["problems"].append(entry)
    return entry


def is_pending(result: Result | None) -> bool:
    """Whether an implementation is still to be measured: not begun, or interrupted for the first time."""
    return result is None or (result["status"] == "interrupted" and result["attempts"] < 2)


def lacks_peak(result: Result | None) -> bool:
    """Whether its peak memory is still to be measured."""
    return is_pending(result) or (result is not None and result["status"] == "ok" and "peak_bytes" not in result)


def begin(entry: Entry, name: str) -> None:
    """Set the result that remains if this process dies during the measurement."""
    so_far = entry["results"].get(name, {})
    stands = {"status": "interrupted", "reason": INTERRUPTED, "attempts": so_far.get("attempts", 0) + 1}
    entry["results"][name] = {**so_far, **stands}


def forget_interruption(entry: Entry) -> None:
    """Restore the result from before `begin`."""
    for name, result in list(entry["results"].items()):
        if result["status"] == "interrupted":
            if "peak_bytes" in result or "step_s" in result:
                entry["results"][name] = {**result, "status": "ok", "reason": None}
                del entry["results"][name]["attempts"]
            else:
                del entry["results"][name]


def failure(message: str) -> Result:
    """The result of an implementation that ended with this message."""
    status = "out of memory" if _OUT_OF_MEMORY.search(message) else "failed"
    return {"status": status, "reason": " ".join(message.split())[:300]}


# Figures of a result -----------------------------------------------------------------------------------------------


def was_timed(result: Result) -> bool:
    return result["status"] == "ok" and bool(result.get("step_s"))


def step_seconds(result: Result) -> float:
    return statistics.median(result["step_s"])


def spread(samples: list[float]) -> float:
    """Half the distance between the quartiles, relative to the median."""
    if len(samples) < 3:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / 2 / middle


def forward_seconds(result: Result) -> float | None:
    return statistics.median(result["forward_s"]) if "forward_s" in result else None


def in_gemms(result: Result) -> float:
    """Median time in head GEMMs, each sample by the GEMMs around it."""
    return statistics.median(s / gemm for s, gemm in zip(result["step_s"], result["reference_s"]["gemm"]))


def share_of_rate(result: Result, entry: Entry, reference: str, moved: int, samples: list[float]) -> float:
    """Bytes moved a second, as a share of the reference's around each sample (median)."""
    size = entry["references"][reference]["bytes"]
    seconds = result["reference_s"][reference]
    return statistics.median((moved / s) / (size / r) for s, r in zip(samples, seconds))


def gradient_error(result: Result) -> float | None:
    """Largest relative error of the gradients; None where there are none."""
    return max((value for name, value in result.get("errors", {}).items() if name.startswith("grad_")), default=None)
