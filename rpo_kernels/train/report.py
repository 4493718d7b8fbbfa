"""Output of a run: metrics.json, curves.png and a table."""

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import ProgressCallback, TrainerCallback

from .._files import write_whole

# Prefixes of the metrics over the held-out and the training data, and how these are called in text.
HELD_OUT, TRAINING = "eval", "training"
NAMES = {TRAINING: "training", HELD_OUT: "held-out"}


def write_json(path: Path, content: Any) -> None:
    """Write the file whole; NaN and infinity become null."""
    write_whole(path, json.dumps(_finite(content), indent=1) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricsFile(TrainerCallback):
    """Keeps metrics.json up to date: metrics before and after training, and the history of logs by step."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.content: dict[str, Any] = {
            "settings": settings,
            "finished": False,
            "stopped": None,
            "before": {},
            "after": {},
            "history": [],
        }

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the history so far; what was logged at step 0 is the evaluation before training."""
        history = state.log_history
        self.content["before"] = {k: v for entry in history if entry["step"] == 0 for k, v in entry.items()}
        self.content["history"] = [entry for entry in history if entry["step"] > 0]
        if state.is_world_process_zero:
            self.write()

    def write(self) -> None:
        """Write what is known so far."""
        write_json(self.path, self.content)


class ProgressBar(ProgressCallback):
    """Progress bars with a title and the latest loss and accuracy, in place of a line for every log."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("Training")

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Name the bar."""
        super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)
        if self.prediction_bar is not None:
            self.prediction_bar.set_description("Evaluation")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Show the latest loss, accuracy and speed."""
        if self.training_bar is not None and logs and "loss" in logs and "accuracy" in logs:
            shown = {"loss": f"{logs['loss']:.3f}", "accuracy": f"{logs['accuracy']:.2f}"}
            if "tokens_per_second" in logs:
                shown |= {"tokens/s": f"{logs['tokens_per_second']:,.0f}", "saved": f"{logs['tokens_saved']:.0%}"}
            self.training_bar.set_postfix(shown)


def print_table(before: dict, after: dict, counts: dict[str, int], files: Iterable[tuple[str, Path]]) -> None:
    """Metrics before and after training, and where everything is."""
    table = Table(title="RPO training", title_justify="left")
    table.add_column(overflow="fold")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    rows = (("loss", "loss"), ("reward accuracy", "accuracy"), ("implicit-reward margin", "margin"))
    for label, metric in rows:
        for prefix, name in NAMES.items():
            if prefix in counts:
                values = [run.get(f"{prefix}_{metric}", math.nan) for run in (before, after)]
                table.add_row(f"{label}, {name} ({counts[prefix]} groups)", *(f"{value:.3f}" for value in values))
    console = Console()
    console.print(table)
    for name, path in files:
        console.print(f"{name:<8} {path}", highlight=False, soft_wrap=True)


def draw_curves(path: Path, content: dict) -> None:
    """Loss, accuracy, margin and log-probabilities by step, from what `MetricsFile` keeps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    loss, accuracy, margin, logps = figure.subplots(2, 2, sharex=True).flat
    for axes, metric, title in (
        (loss, "loss", "Loss"),
        (accuracy, "accuracy", "Reward accuracy"),
        (margin, "margin", "Implicit-reward margin, best minus worst"),
    ):
        _draw(axes, content, metric, "", "training", color="tab:blue", alpha=0.5)
        _draw(axes, content, metric, HELD_OUT, "held-out", color="tab:orange", marker="o")
        axes.set_title(title)
    for response, color in (("best", "tab:green"), ("worst", "tab:red")):
        _draw(logps, content, f"logp_{response}", "", f"{response}, training", color=color, alpha=0.5)
        _draw(logps, content, f"logp_{response}", HELD_OUT, f"{response}, held-out", color=color, marker="o")
    accuracy.set_ylim(-0.02, 1.02)
    logps.set_title("Log-probability of a response (nats)")
    for axes in (margin, logps):
        axes.set_xlabel("step")
    for axes in (loss, accuracy, margin, logps):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    scratch = path.with_name(path.name + ".tmp")
    figure.savefig(scratch, format="png", dpi=120)
    os.replace(scratch, path)


def _draw(axes: Any, content: dict, metric: str, prefix: str, label: str, **style: Any) -> None:
    """One line; the first point of a held-out line is the evaluation before training."""
    key = f"{prefix}_{metric}" if prefix else metric
    points = [(0, content["before"][key])] if prefix and key in content["before"] else []
    points += [(entry["step"], entry[key]) for entry in content["history"] if key in entry]
    if points:
        # A value that is not finite leaves a gap.
        steps, values = zip(*((step, math.nan if value is None else value) for step, value in points), strict=True)
        axes.plot(steps, values, label=label, **style)
