"""Charts of results, one for each case: bars for single sizes, lines for sweeps over rows or vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .machine import device_line
from .predictions import Prediction
from .problem import CASES, Problem
from .results import Entry, Result, forward_seconds, in_gemms, spread, step_seconds, was_timed
from .tables import format_bytes, format_ms

_OURS = ("#0b6e4f", "#12a150", "#7bc96f", "#b5d99c", "#2f4f3f", "#8fbc8f")
_OTHERS = ("#4c566a", "#c8553d", "#d08c3f", "#7b5ea7", "#3f7cac", "#a3485f", "#8a8a8a", "#c0a36e", "#5b8e7d", "#bb6bd9")
_PARTS = {"LM head": "#4c566a", "hidden states": "#3f7cac", "gradients": "#d08c3f", "logits and other work": "#c8553d"}
_ENDS = ("out of memory", "wrong")  # where a line stops, marked as that
_MARK = "#a00000"


def draw(data: dict[str, Any], folder: Path, name: str, svg: bool = True) -> list[Path]:
    """Draw a result file's charts, PNG and SVG or PNG only.

    Returns:
        The PNG files.
    """
    if data["kind"] == "memory":
        figure = _memory(data["problems"])
        _caption(figure, data)
        return [save_figure(figure, folder / f"{name}.png", svg)] if any(e["results"] for e in data["problems"]) else []
    paths = []
    for case in CASES:
        entries = [entry for entry in data["problems"] if entry["problem"]["case"] == case]
        if any(entry["results"] for entry in entries):
            figure = (_sweep if _is_sweep(entries) else _bars)(entries)
            _caption(figure, data)
            paths.append(save_figure(figure, folder / f"{name}-{case}.png", svg))
    return paths


def save_figure(figure: Any, path: Path, svg: bool = True) -> Path:
    """A figure as PNG, and as SVG beside it; the same figure gives the same files."""
    figure.savefig(path, dpi=150, bbox_inches="tight")
    if svg:
        with rc_context({"svg.hashsalt": "rpo_kernels"}):
            figure.savefig(path.with_suffix(".svg"), bbox_inches="tight", metadata={"Date": None})
    return path


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes `[rows, columns]`, drawn without a display."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def color_of(names: list[str]) -> dict[str, str]:
    """A colour for each implementation: greens for this package."""
    ours = [name for name in names if name.startswith("rpo_kernels")]
    others = [name for name in names if name not in ours]
    pairs = [
        (name, colors[i % len(colors)])
        for found, colors in ((ours, _OURS), (others, _OTHERS))
        for i, name in enumerate(found)
    ]
    return dict(pairs)


def _caption(figure: Any, data: dict[str, Any]) -> None:
    machine = data["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    figure.supxlabel(f"{device_line(machine)}, {machine['date'][:10]}\n{versions}", fontsize=7, color="#666666")


# Single sizes ------------------------------------------------------------------------------------------------------


def _bars(entries: list[Entry]) -> Any:
    """Time and peak memory of each implementation; a row of two panels for each problem."""
    shown = [{n: r for n, r in entry["results"].items() if r["status"] != "unavailable"} for entry in entries]
    heights = [0.27 * max(2, len(results)) + 0.95 for results in shown]
    has_memory = any("peak_bytes" in r for results in shown for r in results.values())
    figure, axes = new_figure(len(entries), 1 + has_memory, (11 if has_memory else 8, sum(heights) + 0.4))
    axes[0, 0].get_gridspec().set_height_ratios(heights)
    for ax, entry, results in zip(axes, entries, shown):
        names = sorted(results, key=lambda n: step_seconds(results[n]) if was_timed(results[n]) else float("inf"))
        colors = color_of(list(entry["results"]))
        ax[0].set_title(entry["title"], fontsize=9, loc="left")
        _time_bars(ax[0], names, results, colors)
        if has_memory:
            _memory_bars(ax[1], names, results, colors)
    return figure


def _time_bars(ax: Any, names: list[str], results: dict[str, Result], colors: dict[str, str]) -> None:
    timed = {n: results[n] for n in names if was_timed(results[n])}
    for y, name in enumerate(names):
        if name not in timed:
            ax.text(0, y, f" {results[name]['status']}", va="center", fontsize=7, color=_MARK)
            continue
        seconds = step_seconds(timed[name])
        forward = forward_seconds(timed[name])
        ax.barh(y, seconds * 1000, color=colors[name], alpha=0.55)
        ax.barh(y, (seconds if forward is None else forward) * 1000, color=colors[name])
        gemms = f", {in_gemms(timed[name]):.2f} GEMMs" if "gemm" in timed[name]["reference_s"] else ""
        label = f" {format_ms(seconds)} ±{spread(timed[name]['step_s']):.0%}{gemms}"
        ax.text(seconds * 1000, y, label, va="center", fontsize=7)
    has_backward = any(result.get("forward_s", result["step_s"]) != result["step_s"] for result in timed.values())
    _finish_bars(ax, names, max((step_seconds(result) for result in timed.values()), default=1e-3) * 1000)
    ax.set_xlabel("ms, forward (dark) and backward (light)" if has_backward else "ms", fontsize=8)


def _memory_bars(ax: Any, names: list[str], results: dict[str, Result], colors: dict[str, str]) -> None:
    peaks = {n: results[n]["peak_bytes"] / 1e9 for n in names if "peak_bytes" in results[n]}
    for y, name in enumerate(names):
        if name in peaks:
            ax.barh(y, peaks[name], color=colors[name])
            ax.text(peaks[name], y, f" {format_bytes(peaks[name] * 1e9)}", va="center", fontsize=7)
        else:
            status = "not measured" if results[name]["status"] == "ok" else results[name]["status"]
            ax.text(0, y, f" {status}", va="center", fontsize=7, color=_MARK)
    _finish_bars(ax, [""] * len(names), max(peaks.values(), default=1.0))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("peak memory beyond the inputs, GB", fontsize=8)


def _finish_bars(ax: Any, names: list[str], longest: float) -> None:
    """Every name has its place, whether it has a bar or not."""
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.set_xlim(0, max(longest, 1e-9) * 1.45)
    ax.tick_params(axis="x", labelsize=8)


def _memory(entries: list[Entry]) -> Any:
    """What each implementation's peak is made of, and what was predicted."""
    (entry,) = entries
    results = {n: r for n, r in entry["results"].items() if r["status"] == "ok"}
    names = sorted(results, key=lambda n: sum(results[n]["parts"].values()))
    figure, axes = new_figure(1, 1, (9, 0.34 * len(names) + 1.8))
    ax = axes[0, 0]
    for y, n in enumerate(names):
        inputs, parts = results[n]["input_bytes"], results[n]["parts"]
        left = 0.0
        for part, size in zip(_PARTS, (inputs["weight"], inputs["hidden"], parts["gradients"], parts["work"])):
            ax.barh(y, size / 1e9, left=left, color=_PARTS[part], label=part if y == 0 else None)
            left += size / 1e9
        ax.text(left, y, f"  {format_bytes(left * 1e9)}", va="center", fontsize=8)
        if n in entry["predicted"]:
            total = Prediction(**entry["predicted"][n]).total / 1e9
            ax.plot(total, y, marker="D", markersize=5, color="black", markerfacecolor="white", linestyle="none")
    ax.plot([], [], marker="D", color="black", markerfacecolor="white", linestyle="none", label="predicted")
    _finish_bars(ax, names, ax.get_xlim()[1] / 1.2)
    ax.set_xlabel("memory of the loss layer at its peak, GB", fontsize=8)
    ax.set_title(entry["title"], fontsize=9, loc="left")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    return figure


# Sweeps ------------------------------------------------------------------------------------------------------------


def _is_sweep(entries: list[Entry]) -> bool:
    """Whether only the rows, or only the vocabulary, differ."""
    fixed = {
        (e["problem"]["model"], e["problem"]["responses"], e["problem"]["dtype"], e["problem"]["text"]) for e in entries
    }
    rows, vocabs = zip(*map(_size, entries))
    return len(fixed) == 1 and sorted((len(set(rows)), len(set(vocabs)))) == [1, len(entries)] and len(entries) > 1


def _size(entry: Entry) -> tuple[int, int]:
    problem = Problem(**entry["problem"])
    return problem.rows, problem.vocab


def _sweep(entries: list[Entry]) -> Any:
    """Time and peak memory as they grow with rows, or with the vocabulary."""
    axis = 0 if len({_size(e)[0] for e in entries}) > 1 else 1
    entries = sorted(entries, key=lambda e: _size(e)[axis])
    sizes = [_size(e)[axis] for e in entries]
    names = list(dict.fromkeys(n for e in entries for n, r in e["results"].items() if r["status"] in ("ok", *_ENDS)))
    quantities = _quantities([result for entry in entries for result in entry["results"].values()])
    figure, axes = new_figure(1, len(quantities), (4.6 * len(quantities) + 2.6, max(4.6, 0.36 * len(names) + 0.8)))
    colors = color_of(names)
    for ax, (label, quantity) in zip(axes[0], quantities):
        for name in names:
            results = [e["results"].get(name, {"status": "unavailable"}) for e in entries]
            _line(ax, sizes, [quantity(result) for result in results], results, name, colors[name])
        _finish_sweep(ax, label, sizes, ("rows (scored tokens)", "vocabulary")[axis])
    figure.suptitle(_sweep_title(entries[0], axis), fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _quantities(results: list[Result]) -> list[tuple[str, Callable[[Result], float | None]]]:
    """What there is to draw of a sweep, by title."""
    found: list[tuple[str, Callable[[Result], float | None]]] = [
        ("ms", lambda result: step_seconds(result) * 1000 if was_timed(result) else None)
    ]
    if any("gemm" in result.get("reference_s", {}) for result in results):
        found.append(("head GEMMs", lambda result: in_gemms(result) if was_timed(result) else None))
    if any("peak_bytes" in result for result in results):
        found.append(("peak beyond the inputs, GB (under 1 MB as 1 MB)", _peak))
    return found


def _peak(result: Result) -> float | None:
    return max(result["peak_bytes"] / 1e9, 1e-3) if "peak_bytes" in result else None


def _finish_sweep(ax: Any, label: str, sizes: list[int], axis: str) -> None:
    drawn = any(len(line.get_xdata()) for line in ax.lines)
    ax.set(xscale="log", yscale="log" if drawn else "linear", xlabel=axis)
    ax.set_title(label, fontsize=9, loc="left")
    ax.set_xticks(sizes, [f"{s:,}" for s in sizes], fontsize=8)
    ax.minorticks_off()
    if drawn:
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.tick_params(axis="y", labelsize=8)
    ax.grid(alpha=0.25)


def _line(ax: Any, sizes: list[int], values: list[float | None], results: list[Result], name: str, color: str) -> None:
    end = next((i for i, result in enumerate(results) if result["status"] in _ENDS), None)
    label = name if end is None else f"{name}\n({results[end]['status']} at {sizes[end]:,})"
    width = 2.2 if name.startswith("rpo_kernels") else 1.2
    known = [(s, v) for s, v in zip(sizes[:end], values[:end]) if v is not None]
    ax.plot(*(zip(*known) if known else ([], [])), marker="o", ms=3.5, linewidth=width, color=color, label=label)
    if end is not None and known:
        ax.plot(*known[-1], marker="x", markersize=11, markeredgewidth=2, color=color)


def _sweep_title(entry: Entry, axis: int) -> str:
    problem = Problem(**entry["problem"])
    fixed = f"V={problem.vocab}" if axis == 0 else f"{problem.rows} rows"
    hidden = "" if problem.from_logits else f"H={problem.hidden}, "
    return f"{problem.case}, {problem.model}: {hidden}{fixed}, K={problem.responses}, {problem.dtype}"
