"""The same training run with the loss from logits, from hidden states, and from hidden states with the gradient filter.

    python bench/train_levels.py --model DIR --train-data train.jsonl --eval-data test.jsonl
    python bench/train_levels.py ... --steps 4 --max-length 64 --train-groups 8 --eval-groups 4

Each is a process of its own: `rpo-kernels train`, its peak resident memory. Losses, held-out accuracy, time and
memory go to one JSON file and one picture. Times are ratios of steps on the same data, of processes one after another.
A run that was interrupted is continued by the next call with the same arguments, which skips what is done.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.figure import Figure
from training_runs import CURVES, draw_bars, open_results, run_process

from rpo_kernels.benchmark.charts import save_figure
from rpo_kernels.benchmark.results import save_json
from rpo_kernels.benchmark.tables import Table, format_bytes

RUNS = {
    "logits": ["--loss-from", "logits"],
    "head": ["--loss-from", "head"],
    "head, filter 2^-16": ["--loss-from", "head", "--gradient-filter", str(2.0**-16)],
}


def train(arguments: list[str], source: list[str]) -> dict[str, Any]:
    """One run: the metrics and history of its metrics.json, `peak_bytes` resident and `seconds`."""
    with tempfile.TemporaryDirectory(prefix="rpo-training-") as folder:
        argv = [sys.executable, "-m", "rpo_kernels.cli", "train", *arguments, *source, "--output-dir", folder]
        start = time.monotonic()
        peak = run_process(argv)
        metrics = json.loads((Path(folder) / "metrics.json").read_text())
        kept = {name: metrics[name] for name in ("before", "after", "history")}
        return {**kept, "peak_bytes": peak, "seconds": time.monotonic() - start}


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
        "bf16": str(args.bf16).lower(),
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def losses(run: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in run["history"] if "loss" in entry]


def speeds(run: dict[str, Any]) -> list[float]:
    """Tokens a second of each step; none in results from before they were logged."""
    return [entry["tokens_per_second"] for entry in run["history"] if "tokens_per_second" in entry]


def held_out(run: dict[str, Any], metric: str) -> list[tuple[int, float]]:
    """The metric on the held-out groups by step, before training included."""
    key = f"eval_{metric}"
    during = {entry["step"]: entry[key] for entry in run["history"] if key in entry}
    return sorted({0: run["before"][key], **during}.items())


def draw(data: dict[str, Any], folder: Path, name: str, svg: bool = True) -> list[Path]:
    """Training loss, held-out loss and accuracy of the runs, one over the other, and their peak memory; PNG files."""
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    loss, accuracy, eval_loss, memory = figure.subplots(2, 2).flat
    for (source, run), curve in zip(data["runs"].items(), CURVES):
        style = {**curve, "label": source}
        loss.plot(range(1, len(losses(run)) + 1), losses(run), **style)
        accuracy.plot(*zip(*held_out(run, "accuracy")), marker="o", **style)
        eval_loss.plot(*zip(*held_out(run, "loss")), marker="o", **style)
    peaks = {name: run["peak_bytes"] / 1e9 for name, run in data["runs"].items()}
    draw_bars(memory, peaks, "GB", "Peak resident memory of the process")
    titles = {"Training loss": loss, "Held-out reward accuracy": accuracy, "Held-out loss": eval_loss}
    for title, axes in titles.items():
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
        axes.set_xlabel("step", fontsize=9)
        axes.legend(fontsize=8)
    return [save_figure(figure, folder / f"{name}.png", svg)]


def tables_of(data: dict[str, Any]) -> list[Table]:
    """Each run, and the largest difference of its losses to the first run's."""
    reference = next(iter(data["runs"].values()))
    first = losses(reference)
    header = [
        "",
        "time a step / logits",
        "peak memory",
        "largest difference in loss",
        "held-out loss",
        "held-out accuracy",
    ]
    rows = []
    for name, run in data["runs"].items():
        apart = max(abs(a - b) for a, b in zip(losses(run), first, strict=True))
        change = [f"{run['before'][key]:.3f} → {run['after'][key]:.3f}" for key in ("eval_loss", "eval_accuracy")]
        slower = [a / b for a, b in zip(speeds(reference), speeds(run), strict=True)]
        time_a_step = f"{median(slower):.2f}" if slower else "not logged"
        rows.append([name, time_a_step, format_bytes(run["peak_bytes"]), f"{apart:.1e}", *change])
    settings = data["settings"]
    precision = "bfloat16 autocast" if settings.get("bf16") else "float32"
    title = f"{settings['steps']} steps of two groups, K = 4, at most {settings['max_length']} tokens, {precision}"
    return [Table(title, header, rows, [])]


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
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast; default: float32")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder, one below it for the device")
    args = parser.parse_args()
    settings = {k: v for k, v in vars(args).items() if k not in ("model", "train_data", "eval_data", "out")}
    data, path = open_results(args.out, "training", "training-bf16" if args.bf16 else "training", settings)
    for name, source in RUNS.items():
        if name not in data["runs"]:
            data["runs"][name] = train(flags(args), source)
            save_json(data, path)
    print(*draw(data, path.parent, path.stem))


if __name__ == "__main__":
    main()
