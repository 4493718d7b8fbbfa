"""`rpo-kernels train`: from settings to a trained model."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch.utils.data import Subset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from . import demo
from .batches import BatchForm
from .config import Settings, parse
from .data import DataError, read_groups
from .dataset import PreferenceDataset
from .loss_layer import LossLayer
from .models import add_adapter, load_model, load_tokenizer
from .reference import attach_reference_logps
from .report import HELD_OUT, NAMES, TRAINING, MetricsFile, ProgressBar, draw_curves, print_table
from .trainer import RPOTrainer

# Training groups that are evaluated before and after, where no held-out data says how many.
TRAINING_SAMPLE = 64


class RunError(Exception):
    """A run that cannot start as asked; the message says what to do."""


def main(argv: Sequence[str]) -> int:
    """Parse, train, report. Returns the exit status."""
    settings, is_demo = parse(argv, demo.FLAGS)
    try:
        train(settings, is_demo)
    except (DataError, RunError, OSError) as error:
        print(f"rpo-kernels train: error: {error}", file=sys.stderr)
        return 1
    return 0


def train(settings: Settings, is_demo: bool = False) -> dict:
    """Run the training that the settings describe; returns what metrics.json holds."""
    args = settings.training
    output = Path(str(args.output_dir))
    checkpoint = _checkpoint(settings)
    set_seed(args.seed)
    tokenizer = demo.tokenizer() if is_demo else load_tokenizer(str(settings.model.model))
    datasets = _datasets(settings, tokenizer)
    model = _policy(settings, is_demo, list(datasets.values()), tokenizer)
    loss_layer = _loss_layer(settings, model)
    metrics = MetricsFile(output / "metrics.json", _described(settings))
    trainer = RPOTrainer(
        model,
        args,
        settings.objective.build(),
        train_dataset=datasets[TRAINING],
        eval_dataset=datasets.get(HELD_OUT),
        processing_class=tokenizer,
        loss_layer=loss_layer,
        batch_form=_batch_form(settings, model, list(datasets.values()), tokenizer),
        callbacks=[metrics],
    )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressBar)
    metrics.content["before"] = _evaluate(trainer, datasets)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics.content["after"] = _evaluate(trainer, datasets)
    trainer.save_model()
    if trainer.is_world_process_zero():
        metrics.write()
        _report(settings, metrics, {name: len(_sample(name, datasets)) for name in datasets})
    return metrics.content


def _checkpoint(settings: Settings) -> str | None:
    args = settings.training
    last = get_last_checkpoint(args.output_dir) if Path(str(args.output_dir)).is_dir() else None
    if last and not (settings.run.resume or args.resume_from_checkpoint):
        raise RunError(
            f"{args.output_dir} holds checkpoints of an earlier run: "
            "continue it with --resume, or choose another --output-dir"
        )
    if settings.run.resume and not last and args.process_index == 0:
        print(f"{args.output_dir} holds no checkpoint (--save-steps): starting from the beginning", flush=True)
    return args.resume_from_checkpoint or last


def _datasets(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> dict[str, PreferenceDataset]:
    args = settings.data
    is_main = settings.training.process_index == 0
    sources = {
        TRAINING: (args.train_data, args.max_train_groups),
        HELD_OUT: (args.eval_data, args.max_eval_groups),
    }
    datasets = {}
    for name, (path, limit) in sources.items():
        if path is None:
            continue
        dataset = PreferenceDataset(read_groups(path, limit), tokenizer, args.max_length, progress=is_main)
        datasets[name] = dataset
        if is_main:
            print(f"{NAMES[name]}: {dataset.summary()}, from {path}", flush=True)
    return datasets


def _policy(
    settings: Settings, is_demo: bool, datasets: list[PreferenceDataset], tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The model to train, once the reference has been asked and is out of memory."""

    def ask(model: PreTrainedModel) -> None:
        attach_reference_logps(
            datasets,
            model,
            settings.training,
            tokenizer.pad_token_id or 0,
            settings.run.cache_dir,
            _loss_layer(settings, model),
            _batch_form(settings, model, datasets, tokenizer),
        )

    needs_reference = not getattr(settings.objective.build(), "reference_free", False)
    if needs_reference and settings.model.ref_model:
        ask(load_model(settings.model.ref_model, settings.model.dtype))
    model = demo.model() if is_demo else load_model(str(settings.model.model), settings.model.dtype)
    model = add_adapter(model, settings.model)
    if needs_reference and not settings.model.ref_model:
        ask(model)
    return model


def _loss_layer(settings: Settings, model: PreTrainedModel) -> LossLayer:
    run = settings.run
    try:
        return LossLayer.of(model, run.loss_level, memory_budget=run.memory_budget, gradient_filter=run.gradient_filter)
    except ValueError as error:
        raise RunError(str(error)) from error


def _batch_form(
    settings: Settings,
    model: PreTrainedModel,
    datasets: list[PreferenceDataset],
    tokenizer: PreTrainedTokenizerBase,
) -> BatchForm:
    """How the model computes the data, with shared prompts held against separate sequences on the first group."""
    run = settings.run
    model.to(settings.training.device)  # type: ignore[arg-type]
    examples = [example for dataset in datasets for example in dataset.examples]
    try:
        form = BatchForm.of(
            model,
            run.shared_prompts,
            run.max_tokens,
            tokenizer.pad_token_id or 0,
            examples,
            _loss_layer(settings, model),
        )
    except ValueError as error:
        raise RunError(str(error)) from error
    return form


def _sample(name: str, datasets: dict[str, PreferenceDataset]) -> Subset:
    """The held-out data, or as many groups of the training data."""
    size = len(datasets[HELD_OUT]) if HELD_OUT in datasets else TRAINING_SAMPLE
    return Subset(datasets[name], range(min(size, len(datasets[name]))))


def _evaluate(trainer: RPOTrainer, datasets: dict[str, PreferenceDataset]) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in datasets:
        metrics |= trainer.evaluate(_sample(name, datasets), metric_key_prefix=name)
    return metrics


def _described(settings: Settings) -> dict:
    args = settings.training
    kept = ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
    training = {name: getattr(args, name) for name in (*kept, "max_steps", "seed", "bf16", "fp16")}
    return {"training": training} | {name: asdict(getattr(settings, name)) for name in ("model", "data", "objective")}


def _report(settings: Settings, metrics: MetricsFile, counts: dict[str, int]) -> None:
    output = metrics.path.parent
    files = [("model", output), ("metrics", metrics.path)]
    if settings.run.plot:
        draw_curves(output / "curves.png", metrics.content)
        files.append(("plot", output / "curves.png"))
    print_table(metrics.content["before"], metrics.content["after"], counts, files)
