"""Draw the charts of recorded results again, and fill the README's tables from them.

    python bench/make_tables.py

In README.md, what stands between `<!-- begin results: bench/results/NAME.json -->` and `<!-- end results -->` is
replaced by that file's tables and charts, with the device and versions they come from. A word after the file's name
keeps the tables (`tables`) or the charts (`charts`) only.
"""

import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from head import Samples
from native import summarise
from train_levels import compare
from train_levels import draw as draw_training

from rpo_kernels.benchmark.capacity import memory_lines
from rpo_kernels.benchmark.charts import draw_bench, draw_memory
from rpo_kernels.benchmark.reports import columns_of, format_bytes, format_ms, reasons

_BLOCK = re.compile(
    r"(<!-- begin results: (?P<path>\S+)(?: (?P<only>tables|charts))? -->\n).*?(<!-- end results -->)", re.DOTALL
)


def fill(readme: Path) -> None:
    """Replace every results block of a Markdown file; paths are relative to the file."""

    def block(match: re.Match[str]) -> str:
        path = readme.parent / match["path"]
        data = json.loads(path.read_text())
        draw = {"bench": draw_bench, "memory": draw_memory, "training": draw_training}.get(_kind(data))
        charts = [chart.relative_to(readme.parent) for chart in draw(data, path.parent, path.stem)] if draw else []
        text = source(data) + ("" if match["only"] == "charts" else markdown(data))
        if match["only"] != "tables":
            text += "".join(f"\n![{chart.stem}]({chart})\n" for chart in charts)
        return f"{match[1]}{text}{match[4]}"

    readme.write_text(_BLOCK.sub(block, readme.read_text()))


def source(data: dict[str, Any]) -> str:
    """Where results come from, as a line of Markdown."""
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f"driver {machine['driver']}" if machine["driver"] else f"{machine['threads']} threads"
    rates = data.get("rates")
    speeds = f" Copy {rates['copy'] / 1e9:.0f} GB/s, read {rates['read'] / 1e9:.0f} GB/s." if rates else ""
    return f"\n{machine['device']}, {driver}, {machine['date'][:10]}; {versions}.{speeds}\n"


def markdown(data: dict[str, Any]) -> str:
    """A results file's tables."""
    tables = {"bench": _bench, "memory": _memory, "native": _native, "head": _head, "training": _training}[_kind(data)]
    return "".join(
        f"\n{title}:\n\n{_table(header, lines)}" + (f"\nNot measured: {'; '.join(absent)}.\n" if absent else "")
        for title, header, lines, absent in tables(data)
    )


def _kind(data: dict[str, Any]) -> str:
    return "native" if "cases" in data else data["kind"]


Tables = Iterator[tuple[str, list[str], list[list[str]], list[str]]]  # title, header, rows, what is absent and why


def _bench(data: dict[str, Any]) -> Tables:
    for entry in data["problems"]:
        gemm = f" (one head GEMM {format_ms(entry['gemm_s'])} ms, {entry['gemm_dtype']})" if "gemm_s" in entry else ""
        header, lines = columns_of(entry, data["rates"])
        yield entry["title"] + gemm, header, lines, reasons(entry)


def _memory(data: dict[str, Any]) -> Tables:
    yield data["title"], *memory_lines(data), reasons(data)


def _native(data: dict[str, Any]) -> Tables:
    """`bench/native.py`: ratios of medians."""
    header, lines = ["logits"], []
    for case in data["cases"]:
        rows = case["shape"][0] * case["shape"][1]
        ratios = {re.sub(r" \(.*?\)", "", name): ratio for name, ratio in summarise(case["seconds"]).items()}
        header = ["logits", *ratios]
        lines.append([f"{rows} x {case['shape'][2]} {case['dtype']}", *(f"{ratio:.2f}" for ratio in ratios.values())])
    yield "Ratios of medians", header, lines, []


def _head(data: dict[str, Any]) -> Tables:
    """`bench/head.py`: medians in head GEMMs; memory; errors."""
    for part in data.get("time", []):
        samples, lines = Samples(part["seconds"], part["gemm_seconds"]), []
        for name, values in samples.seconds.items():
            extent = f"{min(values):.3g} to {max(values):.3g} ({len(values)})"
            lines.append([name, f"{statistics.median(values):.3g}", extent, f"{samples.gemms(name):.2f}"])
        absent = [f"{name}: {reason}" for name, reason in part["missing"].items()]
        header = ["", "median seconds", "extent (rounds)", "head GEMMs"]
        yield f"{part['title']}, forward and backward", header, lines, absent
    if sweep := data.get("sweep"):
        names = list(sweep[0]["seconds"])
        lines = []
        for point in sweep:
            samples = Samples(point["seconds"], point["gemm_seconds"])
            ours = (f"{statistics.median(samples.seconds[x]):.2f} ({samples.gemms(x):.2f})" for x in names)
            gemm = statistics.median(samples.gemm_seconds[names[0]])
            lines.append([str(point["rows"]), f"{gemm:.2f}", *ours])
        yield "Growth with the rows: median seconds (head GEMMs)", ["rows", "head GEMM", *names], lines, []
    if memory := {name: run for name, run in data.get("memory", {}).items() if run["status"] == "ok"}:
        planned = [format_bytes(run["planned_bytes"]) if "planned_bytes" in run else "" for run in memory.values()]
        lines = [[name, format_bytes(run["peak_bytes"]), p] for (name, run), p in zip(memory.items(), planned)]
        yield "Peak memory beyond the inputs", ["", "peak", "planned"], lines, []
    if precision := data.get("precision"):
        fields = ("nats_response", "grad_hidden", "grad_weight")
        lines = [[name, *(f"{errors[field]:.1e}" for field in fields)] for name, errors in precision.items()]
        header = ["errors against float64", "nats a response", "dL/dhidden", "dL/dweight"]
        yield "Precision", header, lines, []


def _training(data: dict[str, Any]) -> Tables:
    """`bench/train_levels.py`: the same run at each level."""
    settings = data["settings"]
    title = f"{settings['steps']} steps of two groups, K = 4, at most {settings['max_length']} tokens, float32"
    yield title, *compare(data), []


def _table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(row).replace("\n", " ") + " |\n" for row in [header, rule, *lines])


if __name__ == "__main__":
    fill(Path(__file__).parent.parent / "README.md")
