"""Steps of TRL's DPO with its own loss layer and with this package's: losses, time a step and peak memory.

    python bench/trl_steps.py --model DIR --train-data train.jsonl
    python bench/trl_steps.py ... --steps 2 --max-length 64 --repeats 1

TRL's defaults otherwise: gradient checkpointing, bfloat16 autocast, AdamW, a reference model of the same kind. Data are
JSONL with a prompt and responses with rewards; the best and the worst response make a pair. Each run is a process of
its own, all with the same seed, in turns. Results go to bench/results/DEVICE/trl.json after each run; a call with the
same arguments continues them. `python bench/make_docs.py` then fills the table and chart of docs/integrations/trl.md.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from training_runs import CURVES, draw_bars, open_results, run_process

from rpo_kernels.benchmark.charts import save_figure
from rpo_kernels.benchmark.results import save_json
from rpo_kernels.benchmark.tables import Table, format_bytes, markdown

RUNS: dict[str, dict[str, Any] | None] = {
    "TRL's own": None,
    "patched": {},
    "patched, filter 2^-16": {"gradient_filter": 2.0**-16},
}


def pairs(path: str, count: int) -> Any:
    """The best and the worst response to the first prompts."""
    from datasets import Dataset

    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines()[:count]:
        example = json.loads(line)
        ranked = sorted(example["responses"], key=lambda response: response["reward"])
        rows.append(dict(prompt=example["prompt"] + "\n\n", chosen=ranked[-1]["text"], rejected=ranked[0]["text"]))
    return Dataset.from_list(rows)


def train(args: argparse.Namespace, settings: dict[str, Any] | None) -> dict[str, Any]:
    """One run in this process: losses and seconds of each step."""
    import torch
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    if settings is not None:
        from rpo_kernels.integrations.trl import patch

        patch(**settings)
    seconds: list[float] = []
    cpu_seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.start = time.perf_counter(), time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.start[0])
            cpu_seconds.append(time.process_time() - self.start[1])

    with tempfile.TemporaryDirectory(prefix="rpo-trl-") as folder:
        trainer = DPOTrainer(
            model=args.model,
            args=DPOConfig(
                folder,
                model_init_kwargs={"dtype": torch.bfloat16},
                per_device_train_batch_size=args.pairs,
                max_length=args.max_length,
                max_steps=args.steps,
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                seed=0,
            ),
            train_dataset=pairs(args.train_data, args.pairs * args.steps),
            callbacks=[Clock()],
        )
        trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    kept = ("loss", "rewards/margins", "logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy", "grad_norm")
    load = os.getloadavg()[0]  # above the number of threads: other processes were running
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "load": load,
        "history": [{name: entry[name] for name in kept} for entry in history],
    }


def run(name: str) -> dict[str, Any]:
    """One run in a process of its own, with its peak resident memory."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        peak = run_process([sys.executable, *sys.argv, "--run", name, "--result", result.name])
        return {**json.loads(Path(result.name).read_text()), "peak_bytes": peak}


def losses(runs: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in runs[0]["history"]]


def step_seconds(runs: list[dict[str, Any]]) -> float:
    """Median over all steps but each run's first."""
    return statistics.median(second for one in runs for second in one["seconds"][1:])


def tables_of(data: dict[str, Any]) -> list[Table]:
    """Seconds a step, peak memory and the largest difference in loss to TRL's own."""
    settings, own = data["settings"], data["runs"]["TRL's own"]
    header = ["", "seconds a step", "times as fast", "peak memory of the process", "largest difference in loss"]
    rows = []
    for name, runs in data["runs"].items():
        apart = max(abs(a - b) for a, b in zip(losses(runs), losses(own), strict=True))
        seconds, peak = step_seconds(runs), max(one["peak_bytes"] for one in runs)
        faster = f"{step_seconds(own) / seconds:.1f}"
        rows.append([name, f"{seconds:.2f}", faster, format_bytes(peak), f"{apart:.1e}"])
    title = (
        f"DPO in TRL {data['machine']['versions']['trl']}: Gemma-3-270M in bfloat16, {settings['steps']} steps of "
        f"{settings['pairs']} pairs of at most {settings['max_length']} tokens"
    )
    note = (
        f"Whole steps, reference model included: medians over {settings['repeats']} runs each, in turns, of one seed."
    )
    return [Table(title, header, rows, [note])]


def draw(data: dict[str, Any], folder: Path, name: str, svg: bool = True) -> list[Path]:
    """The runs' loss curves over one another, seconds a step and peak memory; the PNG file."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, times, memory = figure.subplots(1, 3, width_ratios=[1.6, 1, 1])
    for (label, runs), curve in zip(data["runs"].items(), CURVES):
        loss.plot(range(1, len(losses(runs)) + 1), losses(runs), label=label, **curve)
    loss.set_xlabel("step", fontsize=9)
    loss.set_title("DPO loss", fontsize=10)
    loss.legend(fontsize=8)
    loss.grid(alpha=0.3)
    draw_bars(times, {label: step_seconds(runs) for label, runs in data["runs"].items()}, "s", "Seconds a step")
    peaks = {label: max(one["peak_bytes"] for one in runs) / 1e9 for label, runs in data["runs"].items()}
    draw_bars(memory, peaks, "GB", "Peak memory")
    memory.set_yticks([])
    return [save_figure(figure, folder / f"{name}.png", svg)]


def main() -> None:
    """Run what is not done, save after each run, print the table and draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder, one below it for the device")
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        args.result.write_text(json.dumps(train(args, RUNS[args.run])))
        return
    left_out = ("model", "train_data", "out", "run", "result")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    data, path = open_results(args.out, "trl", "trl", settings)
    for repeat in range(args.repeats):
        for name in RUNS:
            runs = data["runs"].setdefault(name, [])
            if len(runs) == repeat:
                runs.append(run(name))
                save_json(data, path)
    print(markdown(tables_of(data)), *draw(data, path.parent, path.stem, svg=False))


if __name__ == "__main__":
    main()
