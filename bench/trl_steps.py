"""Steps of TRL's DPO with its own loss layer and with this package's: losses, time a step and peak memory.

    python bench/trl_steps.py --model DIR --train-data train.jsonl
    python bench/trl_steps.py ... --steps 2 --max-length 64 --repeats 1

TRL's defaults otherwise: gradient checkpointing, bfloat16 autocast, AdamW, a reference model of the same kind. Data are
JSONL with a prompt and responses with rewards; the best and the worst response make a pair. Each run is a process of
its own, all with the same seed, in turns. A call that was interrupted is continued by the next one with the same
arguments.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rpo_kernels.benchmark.machine import describe_machine, same_setup
from rpo_kernels.benchmark.results import save_json
from rpo_kernels.benchmark.tables import format_bytes

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
    load = os.getloadavg()[0]  # above the number of threads: others were at work, and times say little
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "load": load,
        "history": [{name: entry[name] for name in kept} for entry in history],
    }


def run(name: str) -> dict[str, Any]:
    """One run in a process of its own, with its peak resident memory."""
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        process = subprocess.Popen([sys.executable, *sys.argv, "--run", name, "--result", result.name])
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this child alone
        if status:
            raise SystemExit(f"run {name!r} ended with {os.waitstatus_to_exitcode(status)}")
        return {**json.loads(Path(result.name).read_text()), "peak_bytes": usage.ru_maxrss * 1024}


def losses(runs: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in runs[0]["history"]]


def step_seconds(runs: list[dict[str, Any]]) -> float:
    """Median over all steps but each run's first."""
    return statistics.median(second for one in runs for second in one["seconds"][1:])


def table(data: dict[str, Any]) -> str:
    """The measured figures as Markdown, for the documentation."""
    settings, machine = data["settings"], data["machine"]
    own = data["runs"]["TRL's own"]
    lines = [
        f"Whole steps of DPO in TRL {data['trl']}: Gemma-3-270M in bfloat16 (vocabulary 262,144), {settings['pairs']} "
        f"pairs of at most {settings['max_length']} tokens, {settings['steps']} steps from one seed, TRL's defaults "
        f"otherwise, reference model included; {machine['device']}, {machine['threads']} threads, {data['units']}. "
        f"Medians over {settings['repeats']} runs each, in turns.",
        "",
        "| | seconds a step | | peak memory of the process | largest difference in loss |",
        "|---|---|---|---|---|",
    ]
    for name, runs in data["runs"].items():
        apart = max(abs(a - b) for a, b in zip(losses(runs), losses(own), strict=True))
        times, peak = step_seconds(runs), max(one["peak_bytes"] for one in runs)
        faster = f"{step_seconds(own) / times:.1f} times as fast" if runs is not own else ""
        lines.append(f"| {name} | {times:.2f} | {faster} | {format_bytes(peak)} | {apart:.1e} |")
    return "\n".join(lines) + "\n"


def draw(data: dict[str, Any], path: Path) -> None:
    """The runs' loss curves over one another, seconds a step and peak memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    loss, times, memory = figure.subplots(1, 3, width_ratios=[1.6, 1, 1])
    styles = [("#c8553d", "-", 5.0, 0.35), ("#0b6e4f", "-", 1.8, 1.0), ("#3f7cac", "--", 1.8, 1.0)]
    for (name, runs), (color, line, width, alpha) in zip(data["runs"].items(), styles):
        steps = range(1, len(losses(runs)) + 1)
        loss.plot(steps, losses(runs), color=color, linestyle=line, linewidth=width, alpha=alpha, label=name)
    loss.set_xlabel("step", fontsize=9)
    loss.legend(fontsize=8)
    loss.set_title("DPO loss", fontsize=10)
    colors, names = [color for color, *_ in styles], list(data["runs"])
    seconds = [step_seconds(runs) for runs in data["runs"].values()]
    peaks = [max(one["peak_bytes"] for one in runs) / 1e9 for runs in data["runs"].values()]
    for axes, values, title, unit in ((times, seconds, "Seconds a step", "s"), (memory, peaks, "Peak memory", "GB")):
        bars = axes.barh(names, values, color=colors, alpha=0.8)
        axes.bar_label(bars, [f" {value:.2f} {unit}" for value in values], fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, max(values) * 1.3)
        axes.set_title(title, fontsize=10)
    memory.set_yticks([])
    for axes in (loss, times, memory):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run what is not done, save after each run, draw and tabulate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or hub id")
    parser.add_argument("--train-data", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--output", type=Path, default=Path("bench/results/cpu-trl.json"))
    parser.add_argument("--run", choices=RUNS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        args.result.write_text(json.dumps(train(args, RUNS[args.run])))
        return
    import torch
    import trl

    left_out = ("model", "train_data", "output", "run", "result")
    settings = {k: v for k, v in vars(args).items() if k not in left_out}
    machine = describe_machine("cpu")
    data: dict[str, Any] = {"kind": "trl", "machine": machine, "trl": trl.__version__, "settings": settings}
    data["units"] = "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "no avx512_bf16"
    data["runs"] = {name: [] for name in RUNS}
    if args.output.exists():
        earlier = json.loads(args.output.read_text())
        if earlier["settings"] == settings and same_setup(earlier["machine"], machine):
            data = earlier
    for repeat in range(args.repeats):
        for name in RUNS:
            if len(data["runs"][name]) == repeat:
                data["runs"][name].append(run(name))
                save_json(data, args.output)
    draw(data, args.output.with_suffix(".png"))
    args.output.with_suffix(".md").write_text(table(data), encoding="utf-8")
    print(table(data))


if __name__ == "__main__":
    main()
