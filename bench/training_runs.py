"""Shared by the comparisons of training runs: their result file, peak memory of a process, and parts of their charts.

The result file is that of `rpo_kernels.benchmark.results` with `settings` and `runs`, by name, in place of `problems`.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

from rpo_kernels.benchmark.machine import describe_machine, same_setup
from rpo_kernels.benchmark.results import load_json, new_results, result_path

# Of the curves of up to three runs drawn over one another, the first one widest.
CURVES: list[dict[str, Any]] = [
    dict(color="#c8553d", linestyle="-", linewidth=4.0, alpha=0.35),
    dict(color="#0b6e4f", linestyle="-", linewidth=1.8, alpha=1.0),
    dict(color="#3f7cac", linestyle="--", linewidth=1.8, alpha=1.0),
]


def open_results(out: Path, kind: str, name: str, settings: dict[str, Any]) -> tuple[dict[str, Any], Path]:
    """The results of an earlier call with the same settings on the same setup, or new ones; and their file."""
    data = new_results(kind, describe_machine("cpu")) | {"settings": settings, "runs": {}}
    path = result_path(out, data["machine"], name)
    if path.exists():
        earlier = load_json(path)
        if earlier["settings"] == settings and same_setup(earlier["machine"], data["machine"]):
            return earlier, path
    return data, path


def run_process(command: list[str]) -> int:
    """Run a command to its end; its peak resident memory in bytes.

    Raises:
        SystemExit: if the command fails.
    """
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)  # of this child alone
    if status:
        raise SystemExit(f"{' '.join(command)}\nended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024


def draw_bars(axes: Any, values: dict[str, float], unit: str, title: str) -> None:
    """Horizontal bars of the runs, in the colours of their curves, with their values."""
    colors = [curve["color"] for curve, _ in zip(CURVES, values)]
    bars = axes.barh(list(values), list(values.values()), color=colors, alpha=0.8)
    axes.bar_label(bars, [f" {value:.2f} {unit}" for value in values.values()], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values.values()) * 1.3)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
