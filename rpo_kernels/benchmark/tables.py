"""Tables of results, for the terminal and for Markdown."""

import statistics
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .machine import device_line, versions_line
from .predictions import Prediction
from .problem import Problem
from .results import (
    Entry,
    Result,
    forward_seconds,
    gradient_error,
    in_gemms,
    share_of_rate,
    spread,
    step_seconds,
    was_timed,
)

_NAME_WIDTH = 18  # of the first column at least; where the terminal is too narrow, the last columns are left out
LEGEND = """ms: a forward and a backward pass; ±: half the distance of its quartiles; forward: its part of ms;
of read, of copy: bytes that must move, a second, as a share of what the machine reads or copies beside each sample;
GEMMs: ms in head GEMMs beside each sample; peak: memory beyond the inputs; error: of gradients, relative, against
float64, and nats: of a response's log-probability; all by medians."""


class Table(NamedTuple):
    """Cells as text, the most important columns first."""

    title: str
    header: list[str]
    lines: list[list[str]]
    notes: list[str]


def format_bytes(size: float) -> str:
    """With three digits, in powers of ten: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError


def format_ms(seconds: float) -> str:
    return f"{seconds * 1000:.3g}" if seconds < 1 else f"{seconds * 1000:.0f}"


def tables_of(data: dict[str, Any]) -> list[Table]:
    """The tables of a result file."""
    table = {"bench": _bench_table, "memory": _memory_table}[data["kind"]]
    return [table(entry) for entry in data["problems"]]


# Time --------------------------------------------------------------------------------------------------------------


def _bench_table(entry: Entry) -> Table:
    """The fastest first; notes list the implementations without a result, with the reason."""
    problem = Problem(**entry["problem"])
    timed = {name: result for name, result in entry["results"].items() if was_timed(result)}
    costs = _cost_header(problem)
    header = ["implementation", "ms", *costs, "peak", "error", "nats", "forward", "±"]
    lines = []
    for name, result in sorted(timed.items(), key=lambda item: step_seconds(item[1])):
        cells = [format_ms(step_seconds(result)), *_costs(problem, entry, result)]
        cells.append(format_bytes(result["peak_bytes"]) if "peak_bytes" in result else "")
        for error in (gradient_error(result), result.get("errors", {}).get("nats_response")):
            cells.append("" if error is None else f"{error:.1e}")
        forward = forward_seconds(result) if problem.kind.gradients else None
        cells.append("" if forward is None else format_ms(forward))
        lines.append([name, *cells, f"{spread(result['step_s']):.0%}"])
    notes = [*_reference_notes(entry, timed), *_lead(timed), *reasons(entry)]
    return Table(entry["title"], *_filled(header, lines), notes)


def _filled(header: list[str], lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that are not empty."""
    kept = [i for i in range(len(header)) if not lines or any(line[i] for line in lines)]
    return [header[i] for i in kept], [[line[i] for i in kept] for line in lines]


def _cost_header(problem: Problem) -> list[str]:
    if problem.kind.source == "rows":
        return ["stats of read", "grad of copy"]
    return ["GEMMs"] if problem.kind.references == ("gemm",) else [f"of {problem.kind.references[0]}"]


def _costs(problem: Problem, entry: Entry, result: Result) -> list[str]:
    """Against the references. The least that must move: each pass reads the logits, a gradient is written once."""
    size, step = problem.logits_bytes, result["step_s"]
    if problem.kind.source == "rows":
        read = share_of_rate(result, entry, "read", size, result["forward_s"])
        backward = [s - f for s, f in zip(step, result["forward_s"])]
        copy = share_of_rate(result, entry, "copy", 2 * size, backward)
        return [f"{read:.0%}", f"{copy:.0%}"]
    if problem.kind.references == ("gemm",):
        return [f"{in_gemms(result):.2f}"]
    (reference,) = problem.kind.references
    return [f"{share_of_rate(result, entry, reference, size * (3 if problem.kind.gradients else 1), step):.0%}"]


def _reference_notes(entry: Entry, timed: dict[str, Result]) -> list[str]:
    notes = []
    for name, facts in entry.get("references", {}).items():
        samples = [s for result in timed.values() for s in result["reference_s"][name]]
        if not samples:
            continue
        seconds = statistics.median(samples)
        if "dtype" in facts:
            rate = f"{facts['flops'] / seconds / 1e9:.0f} GFLOP/s"
            notes.append(f"one head GEMM in {facts['dtype']}: {format_ms(seconds)} ms, {rate}")
        else:
            notes.append(f"{name}: {facts['bytes'] / seconds / 1e9:.3g} GB/s")
    return ["; ".join(notes)] if notes else []


def _lead(timed: dict[str, Result]) -> list[str]:
    """How this package compares with the fastest of the others."""
    others = {name: step_seconds(r) for name, r in timed.items() if not name.startswith("rpo_kernels")}
    ours = {name: step_seconds(r) for name, r in timed.items() if name in ("rpo_kernels", "rpo_kernels in place")}
    notes = []
    if others and ours:
        fastest = min(others, key=others.__getitem__)
        ratios = ", ".join(f"{others[fastest] / seconds:.2f} times as long as {name}" for name, seconds in ours.items())
        notes.append(f"the fastest of the others, {fastest}, takes {ratios}")
    for name, result in timed.items():
        if (base := name.split(" @ ")[0]) != name and base in timed:
            notes.append(f"{name} takes {step_seconds(result) / step_seconds(timed[base]):.3f} times as long as {base}")
    return notes


def reasons(entry: Entry) -> list[str]:
    """Why each implementation without a result has none."""
    return [
        f"{name}: {result['status']}" + ("" if result["status"] == "out of memory" else f", {result['reason']}")
        for name, result in entry["results"].items()
        if result["status"] != "ok"
    ]


# Memory ------------------------------------------------------------------------------------------------------------


def _memory_table(entry: Entry) -> Table:
    """What each peak is made of, the least first."""
    header = ["implementation", "total", "predicted", "work", "grads", "weight", "hidden", "resident"]
    lines = []
    for name in dict.fromkeys([*entry["results"], *entry["predicted"]]):
        result = entry["results"].get(name, {})
        known = Prediction(**entry["predicted"][name]) if name in entry["predicted"] else None
        if result.get("status") == "ok":
            inputs, parts = result["input_bytes"], result["parts"]
            found = Prediction(inputs["weight"], inputs["hidden"], parts["gradients"], parts["work"])
            resident = format_bytes(sum(inputs.values()) + result["peak_bytes"])
        elif known and not entry["results"]:
            found, resident = known, ""
        else:
            continue
        shown = f"{format_bytes(known.total)} ({known.total / found.total - 1:+.1%})" if known and result else ""
        sizes = [format_bytes(size) for size in (found.work, found.gradients, found.weight, found.hidden)]
        lines.append((found.total, [name, format_bytes(found.total), shown, *sizes, resident]))
    if not entry["results"]:  # nothing was measured: what is shown are the predictions themselves
        header, lines = header[:2] + header[3:7], [(total, line[:2] + line[3:7]) for total, line in lines]
    rows = [line for _, line in sorted(lines, key=lambda line: line[0])]
    return Table(entry["title"], header, rows, reasons(entry))


# Output ------------------------------------------------------------------------------------------------------------


def print_tables(console: Console, data: dict[str, Any]) -> None:
    """All tables of a result file, the machine above and the legend below."""
    console.print(f"{device_line(data['machine'])}; {versions_line(data['machine'])}", highlight=False)
    for table in tables_of(data):
        print_table(console, table)
    if data["kind"] == "bench":
        console.print("\n" + LEGEND.replace("\n", " "), style="dim", highlight=False)


def print_table(console: Console, table: Table) -> None:
    """One table with its notes; the last columns are left out where they do not fit."""
    widths = [max(len(line[i]) for line in [table.header, *table.lines]) for i in range(len(table.header))]
    name = min(widths[0], _NAME_WIDTH)
    shown = next((n for n in range(len(widths), 2, -1) if name + sum(w + 1 for w in widths[1:n]) <= console.width), 2)
    drawn = RichTable(
        title=table.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for index, text in enumerate(table.header[:shown]):
        drawn.add_column(text, justify="right" if index else "left", no_wrap=index > 0, min_width=0 if index else name)
    for line in table.lines:
        drawn.add_row(*line[:shown])
    console.print()
    console.print(drawn)
    notes = list(table.notes)
    if shown < len(table.header):
        notes.append(f"too narrow for: {', '.join(table.header[shown:])}")
    for note in notes:
        console.print(f"  {note}", style="dim", highlight=False, markup=False)


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join("| " + " | ".join(row) + " |\n" for row in [header, rule, *lines])


def markdown(tables: list[Table]) -> str:
    """Tables with their titles and notes."""
    text = ""
    for table in tables:
        text += f"\n**{table.title}**\n\n{markdown_table(table.header, table.lines)}"
        text += "".join(f"\n- {note}" for note in table.notes) + "\n" * bool(table.notes)
    return text
