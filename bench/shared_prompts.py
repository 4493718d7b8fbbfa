"""Training steps with shared prompts and with separate padded sequences, in turn, on a real model and data.

    python bench/shared_prompts.py --model DIR --data train.jsonl
    python bench/shared_prompts.py --model DIR --data train.jsonl --context 500 --steps 6

Two copies of the model are trained side by side on the same groups, one step of each form after the other, so that
changes in the machine's speed affect both: losses, seconds of wall and CPU time, tokens computed, and the peak resident
memory of a step beyond weights and optimizer. `--context` puts that many tokens of the data before each prompt. Results
are added to bench/results/DEVICE/shared-prompts.json, of which `python bench/make_docs.py` makes table and chart.
"""

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from matplotlib.figure import Figure
from training_runs import open_results

from rpo_kernels import RPO
from rpo_kernels.benchmark.charts import save_figure
from rpo_kernels.benchmark.peaks import ResidentSet
from rpo_kernels.benchmark.results import save_json
from rpo_kernels.benchmark.tables import Table, format_bytes, markdown
from rpo_kernels.shared_prompts.plan import StepSize, padded_size, shared_size, step_flops
from rpo_kernels.train import BatchForm, PreferenceDataset, read_groups
from rpo_kernels.train.batches import response_logps_by_group
from rpo_kernels.train.dataset import Example
from rpo_kernels.train.loss_layer import LossLayer, preference_loss
from rpo_kernels.train.models import load_model, load_tokenizer

SETTINGS = ("context", "shortest_of", "max_length", "dtype", "learning_rate")
FORMS = {"padded": BatchForm(), "shared": BatchForm(shared=True)}


def examples(args: argparse.Namespace) -> list[Example]:
    """The first groups of the data, or the shortest of some, with `--context` tokens of the last before each prompt."""
    groups = read_groups(args.data)
    data = list(PreferenceDataset(groups, load_tokenizer(args.model), args.max_length))
    pool = [token for example in reversed(data) for token in example.prompt[1:] + example.responses[0]]
    if args.shortest_of:
        shortest = sorted(data[: args.shortest_of], key=lambda e: padded_size(*lengths(e)).tokens)[: args.steps]
        data = [example for example in data if example in shortest]
    chosen = data[: args.steps]
    for index, example in enumerate(chosen):
        start = index * args.context
        # A sequence's first token stays first.
        example.prompt[1:1] = pool[start : start + args.context]
    return chosen


def lengths(example: Example) -> tuple[int, list[int]]:
    """Of the prompt and of the responses."""
    return len(example.prompt), [len(response) for response in example.responses]


class Trained:
    """A copy of the model, trained in one form."""

    def __init__(self, args: argparse.Namespace, form: BatchForm):
        self.form = form
        self.model = load_model(args.model, args.dtype).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.learning_rate)
        self.layer = LossLayer("head", memory_budget="1GB")

    def step(self, example: Example) -> dict[str, Any]:
        """One optimizer step on one group."""
        gc.collect()
        memory = ResidentSet()
        start, processor = time.perf_counter(), time.process_time()
        (batch,) = self.form([example])["micro_batches"]
        loss = preference_loss(self.model, batch, RPO(eta=0.3), self.layer).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            "loss": loss.item(),
            "seconds": time.perf_counter() - start,
            "processor_seconds": time.process_time() - processor,
            "tokens": batch["input_ids"].numel(),
            "peak_bytes": memory.peak(),
        }


def measure(args: argparse.Namespace) -> tuple[dict[str, Any], Path]:
    """Both forms, step by step in turn; saved after each step."""
    data, path = open_results(args.out, "shared prompts", "shared-prompts", {})
    groups = examples(args)
    trained = {name: Trained(args, form) for name, form in FORMS.items()}
    first = trained["padded"]
    attach_reference(groups, first, path.with_suffix(f".reference-{args.context}.json"))
    if args.reference_only:
        return data, path
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMS}
    run: dict[str, Any] = {"settings": {name: getattr(args, name) for name in SETTINGS}, "steps": steps}
    for index, example in enumerate(groups):
        for name in list(FORMS) if index % 2 else reversed(FORMS):
            steps[name].append(trained[name].step(example))
        run["predicted"] = predicted(first.model, groups[: index + 1])
        save_json(data | {"runs": {**data["runs"], title_of(run): run}}, path)
        print(
            *(f"{name} {s[-1]['loss']:.5f} {s[-1]['processor_seconds']:.2f} s" for name, s in steps.items()), flush=True
        )
    data["runs"][title_of(run)] = run
    return data, path


def attach_reference(data: list[Example], trained: Trained, cache: Path) -> None:
    """The log-probabilities of the model as it is before training; kept in a file, for runs that are repeated."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    for example in data:
        key = str([example.prompt, example.responses])
        if key not in known:
            known[key] = response_logps_by_group(trained.model, FORMS["shared"]([example]), trained.layer)[0].tolist()
            save_json(known, cache)
        example.ref_logps = known[key]


def predicted(model: torch.nn.Module, data: list[Example]) -> dict[str, Any]:
    """How many times the padded form's tokens and operations are those of shared prompts, in all and by step."""
    padded = [padded_size(*lengths(example)) for example in data]
    shared = [shared_size(*lengths(example)) for example in data]
    by_step = [step_flops(model, a) / step_flops(model, b) for a, b in zip(padded, shared)]
    all_padded, all_shared = (sum(sizes, StepSize(0, 0, 0)) for sizes in (padded, shared))
    return {
        "tokens": all_padded.tokens / all_shared.tokens,
        "operations": step_flops(model, all_padded) / step_flops(model, all_shared),
        "operations_by_step": by_step,
    }


def summary(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Of each form: median seconds of the steps but the first, tokens of all, largest peak."""
    return {
        name: {
            "seconds": median(step["seconds"] for step in steps[1:]),
            "tokens": sum(step["tokens"] for step in steps),
            "peak_bytes": max(step["peak_bytes"] for step in steps[1:]),
        }
        for name, steps in run["steps"].items()
    }


def title_of(run: dict[str, Any]) -> str:
    """The groups that a run's steps were on."""
    settings, steps = run["settings"], len(run["steps"]["shared"])
    if settings["context"]:
        return f"{settings['context']} tokens of context, {steps} steps"
    shortest = settings["shortest_of"]
    return f"{steps} shortest of {shortest} groups" if shortest else f"first {steps} groups"


def tables_of(data: dict[str, Any]) -> list[Table]:
    """Each run's two forms and their ratios."""
    rows = []
    for title, run in data["runs"].items():
        forms = summary(run)
        for name, form in forms.items():
            cells = [f"{form['seconds']:.2f}", f"{form['tokens']:,}", format_bytes(form["peak_bytes"])]
            rows.append([title, name, *cells])
        pairs = list(zip(run["steps"]["padded"][1:], run["steps"]["shared"][1:]))
        ratios = {key: forms["padded"][key] / forms["shared"][key] for key in ("tokens", "peak_bytes")}
        ratios["seconds"] = median(a["seconds"] / b["seconds"] for a, b in pairs)
        cells = [f"{ratios['seconds']:.2f} (predicted {run['predicted']['operations']:.2f})"]
        rows.append([title, "padded / shared", *cells, f"{ratios['tokens']:.2f}", f"{ratios['peak_bytes']:.2f}"])
    header = ["groups", "", "seconds a step", "tokens computed", "peak memory of a step"]
    worst = max(map(largest_difference, data["runs"].values()))
    return [Table("Steps of one group, K = 4", header, rows, [f"largest difference of the forms' losses: {worst:.1e}"])]


def largest_difference(run: dict[str, Any]) -> float:
    """Between the two forms' losses, over all steps."""
    return max(abs(a["loss"] - b["loss"]) for a, b in zip(run["steps"]["padded"], run["steps"]["shared"]))


def draw(data: dict[str, Any], folder: Path, name: str, svg: bool = True) -> list[Path]:
    """Ratios of each step's seconds over those of its operations, and the losses of both forms; the PNG file."""
    runs = data["runs"]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    speed, losses = figure.subplots(1, 2)
    for (title, run), marker in zip(runs.items(), "os^"):
        padded, shared = run["steps"]["padded"], run["steps"]["shared"]
        seconds = [a["seconds"] / b["seconds"] for a, b in zip(padded[1:], shared[1:])]
        speed.scatter(run["predicted"]["operations_by_step"][1:], seconds, marker=marker, label=title, alpha=0.7)
    limit = max(speed.get_xlim()[1], speed.get_ylim()[1])
    speed.plot([1, limit], [1, limit], color="gray", linewidth=0.8)
    speed.set_xlabel("operations of a step, padded / shared: predicted")
    speed.set_ylabel("seconds: measured")
    speed.legend(fontsize="small")
    longest = max(runs.values(), key=lambda run: len(run["steps"]["shared"]))
    styles: dict[str, dict[str, Any]] = {
        "padded": dict(linewidth=3, alpha=0.4),
        "shared": dict(linewidth=1, color="black"),
    }
    for form, style in styles.items():
        losses.plot([step["loss"] for step in longest["steps"][form]], label=form, **style)
    losses.set_xlabel("step")
    losses.set_ylabel("loss")
    losses.legend(fontsize="small")
    return [save_figure(figure, folder / f"{name}.png", svg)]


def main() -> None:
    """Measure, add to the results, print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory, hub id or .gguf file")
    parser.add_argument("--data", required=True, help="preference data, a JSONL file")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder, one below it for the device")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--shortest-of", type=int, metavar="N", help="take the shortest of the first N groups")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    parser.add_argument("--reference-only", action="store_true", help="compute the reference's log-probabilities only")
    args = parser.parse_args()
    torch.manual_seed(0)
    data, path = measure(args)
    if data["runs"]:
        print(markdown(tables_of(data)), *draw(data, path.parent, path.stem, svg=False))


if __name__ == "__main__":
    main()
