"""Charts of benchmark results: one for each level; bars for single sizes, lines for sweeps over rows or vocabulary."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .problem import Problem
from .reports import format_bytes, format_ms, step_samples
from .timing import median, spread

_OURS = ("#0b6e4f", "#12a150", "#7bc96f", "#b5d99c")
_OTHERS = ("#4c566a", "#c8553d", "#d08c3f", "#7b5ea7", "#3f7cac", "#a3485f", "#8a8a8a", "#c0a36e", "#5b8e7d", "#bb6bd9")
_PARTS = {"parameters": "#4c566a", "activations": "#3f7cac", "gradients": "#d08c3f", "logits and other work": "#c8553d"}
_ENDS = ("out of memory", "wrong")  # where a line stops, marked as that
Entry = dict[str, Any]


def draw_bench(data: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw PNG and SVG charts of a benchmark's results.

    Returns:
        The PNG files.
    """
    paths = []
    for level, entries in _by_level(data["problems"]).items():
        figure = (_sweep if len({_size(e) for e in entries}) > 1 and _single_model(entries) else _bars)(entries, data)
        _caption(figure, data)
        paths.append(_save(figure, folder / f"{name}-{level}.png"))
    return paths


def draw_memory(data: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw what each provider's peak is made of, and what was predicted.

    Returns:
        The PNG file.
    """
    runs = {n: r for n, r in data["providers"].items() if r["status"] == "ok"}
    names = sorted(runs, key=lambda n: sum(runs[n]["parts"].values()))
    figure, axes = new_figure(1, 1, (9, 0.34 * len(names) + 1.8))
    ax = axes[0, 0]
    for y, n in enumerate(names):
        inputs, parts = runs[n]["input_bytes"], runs[n]["parts"]
        left = 0.0
        for part, size in zip(_PARTS, (inputs["weight"], inputs["hidden"], parts["gradients"], parts["work"])):
            ax.barh(y, size / 1e9, left=left, color=_PARTS[part], label=part if y == 0 else None)
            left += size / 1e9
        ax.text(left, y, f"  {format_bytes(left * 1e9)}", va="center", fontsize=8)
        if n in data["predicted"]:
            predicted = sum(data["predicted"][n].values()) / 1e9
            ax.plot(predicted, y, marker="D", markersize=5, color="black", markerfacecolor="white", linestyle="none")
    ax.plot([], [], marker="D", color="black", markerfacecolor="white", linestyle="none", label="predicted")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, ax.get_xlim()[1] * 1.12)
    ax.set_xlabel("memory of the loss layer at its peak, GB", fontsize=8)
    ax.set_title(data["title"], fontsize=9, loc="left")
    figure.legend(loc="outside upper center", ncols=5, fontsize=8, frameon=False)
    _caption(figure, data)
    return [_save(figure, folder / f"{name}.png")]


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=150, bbox_inches="tight")
    with rc_context({"svg.hashsalt": "rpo_kernels"}):  # the same figure, the same file
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
    """A colour for each provider: greens for this package."""
    ours = [name for name in names if name.startswith("rpo_kernels")]
    others = [name for name in names if name not in ours]
    pairs = [*zip(ours, _OURS), *((name, _OTHERS[i % len(_OTHERS)]) for i, name in enumerate(others))]
    return {**dict.fromkeys(ours, _OURS[-1]), **dict(pairs)}


def _by_level(entries: list[Entry]) -> dict[str, list[Entry]]:
    levels: dict[str, list[Entry]] = {}
    for entry in entries:
        frozen = entry["problem"]["frozen"]
        levels.setdefault("head-frozen" if frozen else entry["problem"]["level"], []).append(entry)
    return levels


def _single_model(entries: list[Entry]) -> bool:
    return len({(e["problem"]["model"], e["problem"]["responses"], e["problem"]["dtype"]) for e in entries}) == 1


def _size(entry: Entry) -> tuple[int, int]:
    problem = Problem(**entry["problem"])
    return problem.rows, problem.vocab


def _caption(figure: Any, data: dict[str, Any]) -> None:
    machine = data["machine"]
    shown = ("rpo-kernels", "torch", "triton", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")
    versions = ", ".join(f"{k} {machine['versions'][k]}" for k in shown if k in machine["versions"])
    text = f"{machine['device']}, {machine['threads']} CPU threads, {machine['date'][:10]}\n{versions}"
    figure.supxlabel(text, fontsize=7, color="#666666")


def _bars(entries: list[Entry], data: dict[str, Any]) -> Any:
    """Time and peak memory of each provider; a row of two panels for each problem."""
    lines = max(len(entry["providers"]) for entry in entries)
    figure, axes = new_figure(len(entries), 2, (11, (0.27 * lines + 1.1) * len(entries) + 0.4))
    for row, entry in enumerate(entries):
        runs = {n: r for n, r in entry["providers"].items() if r["status"] not in ("unavailable",)}
        names = sorted(runs, key=lambda n: median(step_samples(runs[n])) if "forward_s" in runs[n] else float("inf"))
        colors = color_of(list(entry["providers"]))
        axes[row, 0].set_title(entry["title"], fontsize=9, loc="left")
        _time_bars(axes[row, 0], names, runs, colors)
        _memory_bars(axes[row, 1], names, runs, colors)
    return figure


def _time_bars(ax: Any, names: list[str], runs: dict[str, Any], colors: dict[str, str]) -> None:
    measured = [median(step_samples(runs[n])) * 1000 for n in names if "forward_s" in runs[n]]
    for y, name in enumerate(names):
        run = runs[name]
        if "forward_s" not in run:
            ax.text(0, y, f" {run['status']}", va="center", fontsize=7, color="#a00000")
            continue
        forward, both = median(run["forward_s"]) * 1000, median(step_samples(run)) * 1000
        ax.barh(y, both, color=colors[name], alpha=0.55)
        ax.barh(y, forward, color=colors[name])
        label = f" {format_ms(step_samples(run))} ±{spread(step_samples(run)):.0%}"
        ax.text(both, y, label, va="center", fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.invert_yaxis()
    ax.set_xlim(0, max(measured, default=1) * 1.22)
    ax.set_xlabel("ms, forward (dark) and backward (light)", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _memory_bars(ax: Any, names: list[str], runs: dict[str, Any], colors: dict[str, str]) -> None:
    peaks = {n: runs[n]["peak_bytes"] for n in names if "peak_bytes" in runs[n]}
    for y, name in enumerate(names):
        if name in peaks:
            ax.barh(y, peaks[name] / 1e9, color=colors[name])
            ax.text(peaks[name] / 1e9, y, f" {format_bytes(peaks[name])}", va="center", fontsize=7)
        else:
            ax.text(0, y, f" {runs[name]['status']}", va="center", fontsize=7, color="#a00000")
    ax.set_yticks([])
    ax.invert_yaxis()
    ax.set_xlim(0, max(peaks.values(), default=1e9) / 1e9 * 1.22)
    ax.set_xlabel("peak memory beyond the inputs, GB", fontsize=8)
    ax.tick_params(axis="x", labelsize=8)


def _sweep(entries: list[Entry], data: dict[str, Any]) -> Any:
    """Time and peak memory as they grow with rows, or with the vocabulary."""
    axis = 0 if len({_size(e)[0] for e in entries}) > 1 else 1
    entries = sorted(entries, key=lambda e: _size(e)[axis])
    sizes = [_size(e)[axis] for e in entries]
    shown = ("ok", *_ENDS)
    names = list(dict.fromkeys(n for e in entries for n, r in e["providers"].items() if r["status"] in shown))
    figure, axes = new_figure(1, 2, (11, 4.6))
    colors = color_of(names)
    quantities: list[tuple[str, Callable]] = [
        ("forward + backward, ms", lambda run: median(step_samples(run)) * 1000 if "forward_s" in run else None),
        (
            "peak memory beyond the inputs, GB (less than 1 MB drawn as 1 MB)",
            lambda run: max(run["peak_bytes"] / 1e9, 1e-3) if "peak_bytes" in run else None,
        ),
    ]
    for ax, (label, quantity) in zip(axes[0], quantities):
        for name in names:
            runs = [e["providers"].get(name, {"status": "unavailable"}) for e in entries]
            _line(ax, sizes, [quantity(run) for run in runs], runs, name, colors[name])
        drawn = any(len(line.get_xdata()) for line in ax.lines)
        ax.set(xscale="log", yscale="log" if drawn else "linear", xlabel=("rows (scored tokens)", "vocabulary")[axis])
        ax.set_title(label, fontsize=9, loc="left")
        ax.set_xticks(sizes, [f"{s:,}" for s in sizes], fontsize=8)
        ax.minorticks_off()
        if drawn:
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
        ax.tick_params(axis="y", labelsize=8)
        ax.grid(alpha=0.25)
    figure.suptitle(_sweep_title(entries[0], axis), fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def _line(ax: Any, sizes: list[int], values: list[float | None], runs: list[Any], name: str, color: str) -> None:
    end = next((i for i, run in enumerate(runs) if run["status"] in _ENDS), None)
    label = name if end is None else f"{name}\n({runs[end]['status']} at {sizes[end]:,})"
    width = 2.2 if name.startswith("rpo_kernels") else 1.2
    known = [(s, v) for s, v in zip(sizes[:end], values[:end]) if v is not None]
    ax.plot(*(zip(*known) if known else ([], [])), marker="o", ms=3.5, linewidth=width, color=color, label=label)
    if end is not None and known:
        ax.plot(*known[-1], marker="x", markersize=11, markeredgewidth=2, color=color)


def _sweep_title(entry: Entry, axis: int) -> str:
    problem = Problem(**entry["problem"])
    fixed = f"V = {problem.vocab:,}" if axis == 0 else f"{problem.rows:,} rows"
    hidden = f"H = {problem.hidden:,}, " if problem.hidden else ""
    frozen = ", frozen head" if problem.frozen else ""
    return f"{problem.level} level, {problem.model}: {hidden}{fixed}, K = {problem.responses}, {problem.dtype}{frozen}"
