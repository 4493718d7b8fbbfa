"""The same training run at the logits level, at the head level, and at the head level with the column filter.

    python bench/train_levels.py --model DIR --train-data train.jsonl --eval-data test.jsonl
    python bench/train_levels.py ... --steps 4 --max-length 64 --train-groups 8 --eval-groups 4

Each is a process of its own: `rpo-kernels train`, its peak resident memory. Losses, held-out accuracy and
memory go to one JSON file and one picture. A run that was interrupted is continued by the next call with the same
arguments, which skips what is done.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rpo_kernels.benchmark.charts import save_figure
from rpo_kernels.benchmark.machine import describe_machine, same_setup
from rpo_kernels.benchmark.results import new_results, result_path, save_json
from rpo_kernels.benchmark.tables import format_bytes

RUNS = {
    "logits": ["--loss-level", "logits"],
    "head": ["--loss-level", "head"],
    "head, filter 2^-16": ["--loss-level", "head", "--gradient-filter", str(2.0**-16)],
}


def train(arguments: list[str], level: list[str]) -> dict[str, Any]:
    """One run: the metrics and history of its metrics.json, `peak_bytes` resident and `seconds`."""
    with tempfile.TemporaryDirectory(prefix="rpo-training-") as folder:
        argv = [sys.executable, "-m", "rpo_kernels.cli", "train", *arguments, *level, "--output-dir", folder]
        start = time.monotonic()
        process = subprocess.Popen(argv)
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this child alone
        if status:
            raise SystemExit(f"{' '.join(argv)}\nended with {os.waitstatus_to_exitcode(status)}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        kept = {name: metrics[name] for name in ("before", "after", "history")}
        return {**kept, "peak_bytes": usage.ru_maxrss * 1024, "seconds": time.monotonic() - start}


def flags(args: argparse.Namespace) -> list[str]:
    """The arguments of `rpo-kernels train` that all runs share."""
    given = {
        "model": args.model,
        "train-data": args.train_data,
        "eval-data": args.eval_data,
        "max-length": args.max_length,
        "max-train-groups": args.train_groups,
        "max-eval-groups": args.eval_groups,
        "max-steps": args.steps,
        "learning-rate": args.learning_rate,
        "lr-scheduler-type": "constant",
        "eta": 0.3,
        "per-device-train-batch-size": 1,
        "gradient-accumulation-steps": 2,
        "per-device-eval-batch-size": 1,
        "eval-strategy": "steps",
        "eval-steps": max(1, args.steps // 4),
        "save-strategy": "no",
        "use-cpu": "true",
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def losses(run: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in run["history"] if "loss" in entry]


def held_out(run: dict[str, Any], metric: str) -> list[tuple[int, float]]:
    """The metric on the held-out groups by step, before training included."""
    key = f"eval_{metric}"
    during = {entry["step"]: entry[key] for entry in run["history"] if key in entry}
    return sorted({0: run["before"][key], **during}.items())


def draw(data: dict[str, Any], folder: Path, name: str, svg: bool = True) -> list[Path]:
    """Training loss, held-out loss and accuracy of the runs, one over the other, and their peak memory; PNG files."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    loss, accuracy, eval_loss, memory = figure.subplots(2, 2).flat
    styles = [("#c8553d", "-", 4.0, 0.35), ("#0b6e4f", "-", 1.8, 1.0), ("#3f7cac", "--", 1.8, 1.0)]
    for (level, run), (color, line, width, alpha) in zip(data["runs"].items(), styles):
        style = dict(color=color, linestyle=line, linewidth=width, alpha=alpha, label=level)
        loss.plot(range(1, len(losses(run)) + 1), losses(run), **style)
        accuracy.plot(*zip(*held_out(run, "accuracy")), marker="o", **style)
        eval_loss.plot(*zip(*held_out(run, "loss")), marker="o", **style)
    peaks = {name: run["peak_bytes"] / 1e9 for name, run in data["runs"].items()}
    bars = memory.barh(list(peaks), list(peaks.values()), color=[color for color, *_ in styles], alpha=0.8)
    memory.bar_label(bars, [f" {peak:.2f} GB" for peak in peaks.values()], fontsize=9)
    memory.invert_yaxis()
    memory.set_xlim(0, max(peaks.values()) * 1.2)
    for axes, title in (
        (loss, "Training loss"),
        (accuracy, "Held-out reward accuracy"),
        (eval_loss, "Held-out loss"),
        (memory, "Peak resident memory of the process, GB"),
    ):
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in (loss, accuracy, eval_loss):
        axes.set_xlabel("step", fontsize=9)
        axes.legend(fontsize=8)
    return [save_figure(figure, folder / f"{name}.png", svg)]


def compare(data: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table in the docs: each run, and how far its losses are from the first one's."""
    first = losses(next(iter(data["runs"].values())))
    header = ["", "peak memory", "largest difference in loss", "held-out loss", "held-out accuracy"]
    rows = []
    for name, run in data["runs"].items():
        apart = max(abs(a - b) for a, b in zip(losses(run), first, strict=True))
        change = [f"{run['before'][key]:.3f} → {run['after'][key]:.3f}" for key in ("eval_loss", "eval_accuracy")]
        rows.append([name, format_bytes(run["peak_bytes"]), f"{apart:.1e}", *change])
    return header, rows


def main() -> None:
    """Run what is not done, save after each run, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory, hub id or .gguf file")
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--eval-data", required=True)
    parser.add_argument("--steps", type=int, default=40, help="of two groups each")
    parser.add_argument("--max-length", type=int, default=192)
    parser.add_argument("--train-groups", type=int, default=80)
    parser.add_argument("--eval-groups", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-6)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder, one below it for the device")
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "train_data", "eval_data", "out")}
    data = new_results("training", describe_machine("cpu")) | {"settings": settings, "runs": {}}
    path = result_path(args.out, data["machine"], "training")
    if path.exists():
        earlier = json.loads(path.read_text())
        if earlier["settings"] == settings and same_setup(earlier["machine"], data["machine"]):
            data = earlier
    for name, level in RUNS.items():
        if name not in data["runs"]:
            data["runs"][name] = train(flags(args), level)
            save_json(data, path)
    print(*draw(data, path.parent, path.stem))


if __name__ == "__main__":
    main()
