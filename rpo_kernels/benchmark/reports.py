"""What is written down and shown: the machine, results as JSON, tables for the terminal."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from .. import __version__
from .._files import write_whole
from .problem import Problem
from .timing import median, spread

_PACKAGES = (
    "rpo-kernels",
    "torch",
    "triton",
    "transformers",
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "quack-kernels",
)

_DRIVER_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def describe_machine(device: str) -> dict[str, Any]:
    """Device, driver, versions of everything that is compared, and the date."""
    on_gpu = device != "cpu"
    return {
        "device": torch.cuda.get_device_name() if on_gpu else _processor(),
        "device_memory": torch.cuda.mem_get_info()[1] if on_gpu else _total_memory(),
        "driver": _output(*_DRIVER_QUERY) if on_gpu else None,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {"rpo-kernels": __version__, **{name: v for name in _PACKAGES if (v := _version(name))}},
        "commit": _output("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def device_slug(machine: dict[str, Any]) -> str:
    """A folder name for the device."""
    cpu = "" if machine["driver"] else f" {machine['threads']} threads"
    return re.sub(r"[^a-z0-9.]+", "-", (machine["device"] + cpu).lower()).strip("-")


def same_setup(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether results of both machines may stand in one file."""
    return all(a.get(key) == b.get(key) for key in ("device", "driver", "threads", "versions"))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _total_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def save_json(data: dict[str, Any], path: Path) -> None:
    """Write a file whole or not at all."""
    write_whole(path, json.dumps(data, indent=1) + "\n")


# Quantities --------------------------------------------------------------------------------------------------------


def format_bytes(size: float) -> str:
    """With three digits, in powers of ten: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def format_ms(samples: list[float]) -> str:
    return f"{median(samples) * 1000:.3g}" if median(samples) < 1 else f"{median(samples) * 1000:.0f}"


def streamed_bytes(problem: Problem) -> int:
    """The least that forward and backward move at the logits level: two reads and one write of the logits."""
    return 3 * problem.rows * problem.vocab * problem.itemsize


def gradient_error(run: dict[str, Any]) -> float:
    """Largest relative error of a provider's gradients."""
    return max(value for name, value in run["errors"].items() if name.startswith("grad_"))


# Tables ------------------------------------------------------------------------------------------------------------


def columns_of(entry: dict[str, Any], rates: dict[str, float]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a problem's table, the fastest first; `reasons` has the others."""
    problem = Problem(**entry["problem"])
    cost = "GB/s\n(of copy)" if problem.level == "logits" else "GEMMs"
    header = ["provider", "eval\nms", "fwd\nms", "bwd\nms", "both\nms", "±", cost, "peak", "error"]
    measured = {name: run for name, run in entry["providers"].items() if run["status"] == "ok" and "forward_s" in run}
    lines = []
    for name, run in sorted(measured.items(), key=lambda item: median(step_samples(item[1]))):
        step = step_samples(run)
        if problem.level == "logits":
            rate = streamed_bytes(problem) / median(step)
            cost = f"{rate / 1e9:.3g} ({rate / rates['copy']:.0%})"
        else:
            cost = f"{median(step) / median(entry['gemm_s']):.2f}"
        peak = format_bytes(run["peak_bytes"]) if "peak_bytes" in run else ""
        times = [format_ms(run[f"{part}_s"]) for part in ("evaluation", "forward", "backward")]
        lines.append([name, *times, format_ms(step), f"{spread(step):.0%}", cost, peak, f"{gradient_error(run):.1e}"])
    return header, lines


def step_samples(run: dict[str, Any]) -> list[float]:
    """Seconds of forward and backward together."""
    return [f + b for f, b in zip(run["forward_s"], run["backward_s"])]


def reasons(entry: dict[str, Any]) -> list[str]:
    """Why each provider without a result has none."""
    return [
        f"{name}: {run['status']}" + ("" if run["status"] == "out of memory" else f", {run['reason']}")
        for name, run in entry["providers"].items()
        if run["status"] != "ok"
    ]


def print_table(console: Console, title: str, header: list[str], lines: list[list[str]], notes: list[str]) -> None:
    """One table with its notes below."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", overflow="fold", no_wrap=index > 0)
    for line in lines:
        table.add_row(*line)
    console.print()
    console.print(table)
    for note in notes:
        console.print(f"  [dim]{note}[/dim]", highlight=False)


def print_bench(console: Console, data: dict[str, Any]) -> None:
    """All tables of a benchmark's results."""
    machine, rates = data["machine"], data["rates"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    console.print(f"{machine['device']}, {machine['threads']} threads; {versions}", highlight=False)
    console.print(f"copy {rates['copy'] / 1e9:.0f} GB/s, read {rates['read'] / 1e9:.0f} GB/s", highlight=False)
    for entry in data["problems"]:
        notes = reasons(entry)
        if "gemm_s" in entry:
            notes.insert(0, f"one head GEMM in {entry['gemm_dtype']}: {format_ms(entry['gemm_s'])} ms")
        print_table(console, entry["title"], *columns_of(entry, rates), notes)
    console.print(
        "  eval: loss without gradients; fwd, bwd, both: a training pass, medians; ±: half the distance of quartiles;\n"
        "  copy: torch's copy from tensor to tensor, which work in place may outrun;\n"
        "  GEMMs: both, in head GEMMs; peak: memory beyond the inputs; error: of gradients, relative, against float64.",
        highlight=False,
    )
