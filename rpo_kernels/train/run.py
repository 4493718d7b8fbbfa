"""`rpo-kernels train`: from settings to a trained model."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from . import demo, preflight
from .batches import BatchForm
from .config import Settings, parse
from .data import DataError
from .dataset import PreferenceDataset, default_cache_dir
from .errors import NonFiniteError, RunError
from .identity import run_identity
from .loss_layer import LossLayer
from .models import check_causal, load_config, load_model, load_policy, load_tokenizer
from .output import METRICS, OutputDirectory
from .reference import attach_reference_logps
from .report import HELD_OUT, NAMES, TRAINING, MetricsFile, ProgressBar, draw_curves, print_table
from .trainer import RPOTrainer

# Training groups that are evaluated before and after, where no held-out data says how many.
TRAINING_SAMPLE = 64
# Nats by which a response's log-probability may differ between policy and reference where they are the same model.
ROUNDING = {"float32": 0.01, "half": 1.0}

Datasets = dict[str, PreferenceDataset]


def main(argv: Sequence[str]) -> int:
    """Parse, train, report. Returns the exit status."""
    settings, is_demo = parse(argv, demo.FLAGS)
    try:
        preflight.check_settings(settings)
        train(settings, is_demo)
    except (preflight.SettingError, DataError, RunError, OSError) as error:
        if settings.training.process_index == 0:
            print(f"rpo-kernels train: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, preflight.SettingError) else 1
    return 0


def train(settings: Settings, is_demo: bool = False) -> dict:
    """Run the training that the settings describe; returns what metrics.json holds.

    Raises:
        DataError, RunError, OSError: saying what does not fit, or what stopped the run.
    """
    args = settings.training
    is_main = args.process_index == 0
    with OutputDirectory(Path(str(args.output_dir)), is_main) as output:
        output.check_unused(settings.run)
        tokenizer, configs = _sources(settings, is_demo)
        datasets = _datasets(settings, tokenizer)
        held_out = [datasets[name] for name in datasets if name != TRAINING]
        preflight.check_data(args, datasets[TRAINING], held_out, configs)
        identity = run_identity(settings, datasets)
        if settings.run.resume and output.is_finished() and not settings.run.extend:
            output.check_finished(settings.run, identity)
            _say(is_main, f"{output.path} holds this run, finished: nothing to do")
            return output.metrics()
        checkpoint = output.begin(settings.run, identity, args.resume_from_checkpoint)
        set_seed(args.seed)
        model = _policy(settings, is_demo, datasets, tokenizer, output.path)
        trainer = _trainer(settings, model, datasets, tokenizer, identity)
        return _run(settings, trainer, datasets, checkpoint)


def _say(is_main: bool, line: str) -> None:
    if is_main:
        print(line, flush=True)


def _sources(settings: Settings, is_demo: bool) -> tuple[PreTrainedTokenizerBase, dict[str, PreTrainedConfig]]:
    """The tokenizer, and the configurations of the models by what they are called, checked."""
    preflight.check_cache(_cache_dir(settings))
    source = "the demonstration's model" if is_demo else str(settings.model.model)
    tokenizer: PreTrainedTokenizerBase = demo.tokenizer() if is_demo else load_tokenizer(source)
    configs: dict[str, PreTrainedConfig] = {source: demo.config() if is_demo else load_config(source)}
    preflight.check_model(settings, configs[source], tokenizer)
    if settings.model.ref_model:
        configs[settings.model.ref_model] = load_config(settings.model.ref_model)
    return tokenizer, configs


def _cache_dir(settings: Settings) -> Path:
    return Path(settings.run.cache_dir) if settings.run.cache_dir else default_cache_dir()


def _datasets(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Datasets:
    data, args = settings.data, settings.training
    is_main = args.process_index == 0
    sources = {TRAINING: (data.train_data, data.max_train_groups), HELD_OUT: (data.eval_data, data.max_eval_groups)}
    datasets: Datasets = {}
    for name, (path, limit) in sources.items():
        if path is None:
            continue
        with args.main_process_first(desc=f"tokenising {path}"):
            datasets[name] = PreferenceDataset.from_file(
                path, tokenizer, int(data.max_length or 0), limit, _cache_dir(settings) / "tokens", is_main
            )
        _say(is_main, f"{NAMES[name]}: {datasets[name].summary()}, from {path}")
    return datasets


def _policy(
    settings: Settings, is_demo: bool, datasets: Datasets, tokenizer: PreTrainedTokenizerBase, output: Path
) -> PreTrainedModel:
    """The model to train, after the datasets have got the reference's log-probabilities."""
    args = settings.model

    def attach(model: PreTrainedModel, with_adapter: bool = False) -> None:
        attach_reference_logps(
            datasets.values(),
            model,
            settings.training,
            tokenizer.pad_token_id or 0,
            _cache_dir(settings) / "reference",
            _loss_layer(settings, model),
            _batch_form(settings, model, datasets, tokenizer),
            with_adapter,
        )

    needs_reference = not getattr(settings.objective.build(), "reference_free", False)
    is_main = settings.training.process_index == 0
    if needs_reference and args.ref_model:
        _say(is_main, f"loading the reference {args.ref_model}")
        attach(_ready(settings, load_model(args.ref_model, args.dtype)))
    _say(is_main and not is_demo, f"loading {args.model}")
    model = _ready(settings, demo.model() if is_demo else load_policy(args, output))
    if needs_reference and not args.ref_model:
        attach(model, with_adapter=args.adapter == "continue")
    return model


def _ready(settings: Settings, model: PreTrainedModel) -> PreTrainedModel:
    """The model on its device, where a few tokens show that it is causal."""
    model.to(settings.training.device)  # type: ignore[arg-type]
    check_causal(model)
    return model


def _loss_layer(settings: Settings, model: PreTrainedModel) -> LossLayer:
    run = settings.run
    try:
        return LossLayer.of(model, run.loss_from, memory_budget=run.memory_budget, gradient_filter=run.gradient_filter)
    except ValueError as error:
        raise RunError(str(error)) from error


def _batch_form(
    settings: Settings, model: PreTrainedModel, datasets: Datasets, tokenizer: PreTrainedTokenizerBase
) -> BatchForm:
    """How the model computes the data, with shared prompts held against separate sequences on the first group."""
    run = settings.run
    try:
        return BatchForm.of(
            model,
            run.shared_prompts,
            run.max_tokens,
            tokenizer.pad_token_id or 0,
            datasets[TRAINING],
            max(dataset.longest() for dataset in datasets.values()),
            _loss_layer(settings, model),
        )
    except ValueError as error:
        raise RunError(str(error)) from error


def _trainer(
    settings: Settings,
    model: PreTrainedModel,
    datasets: Datasets,
    tokenizer: PreTrainedTokenizerBase,
    identity: dict[str, Any],
) -> RPOTrainer:
    args = settings.training
    trainer = RPOTrainer(
        model,
        args,
        settings.objective.build(),
        train_dataset=datasets[TRAINING],
        eval_dataset=datasets.get(HELD_OUT),
        processing_class=tokenizer,
        loss_layer=_loss_layer(settings, model),
        batch_form=_batch_form(settings, model, datasets, tokenizer),
        identity=identity,
        callbacks=[MetricsFile(Path(str(args.output_dir)) / METRICS, _described(settings))],
    )
    if trainer.pop_callback(ProgressCallback):
        trainer.add_callback(ProgressBar)
    return trainer


def _run(settings: Settings, trainer: RPOTrainer, datasets: Datasets, checkpoint: Path | None) -> dict:
    """Evaluate, train, evaluate, save, report."""
    metrics = next(c for c in trainer.callback_handler.callbacks if isinstance(c, MetricsFile))
    trainer.add_callback(_AtStart(lambda: _check_start(settings, _evaluate(trainer, datasets))))
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NonFiniteError as error:
        metrics.content["stopped"] = str(error)
        if trainer.is_world_process_zero():
            metrics.write()
            if settings.run.plot:
                draw_curves(metrics.path.parent / "curves.png", metrics.content)
        raise
    metrics.content["after"] = _evaluate(trainer, datasets)
    trainer.save_whole()
    metrics.content["finished"] = True
    if trainer.is_world_process_zero():
        metrics.write()
        _report(settings, metrics, {name: len(_sample(name, datasets)) for name in datasets})
    return metrics.content


class _AtStart(TrainerCallback):
    """Does something once the trainer has prepared all for training, unless it resumes."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do it."""
        if state.global_step == 0:
            self.action()


def _sample(name: str, datasets: Datasets) -> Subset:
    """The held-out data, or as many groups of the training data."""
    size = len(datasets[HELD_OUT]) if HELD_OUT in datasets else TRAINING_SAMPLE
    return Subset(datasets[name], range(min(size, len(datasets[name]))))


def _evaluate(trainer: RPOTrainer, datasets: Datasets) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for name in datasets:
        metrics |= trainer.evaluate(_sample(name, datasets), metric_key_prefix=name)
    return metrics


def _check_start(settings: Settings, before: dict[str, float]) -> None:
    """Policy and reference are still the same model, where no other reference was given."""
    loss, drift = before[f"{TRAINING}_loss"], before[f"{TRAINING}_drift"]
    if not math.isfinite(loss):
        raise NonFiniteError(
            f"the loss is {loss} before the first step: look at the objective's parameters and --dtype"
        )
    objective = settings.objective.build()
    if settings.model.ref_model or getattr(objective, "reference_free", False):
        return
    args = settings.training
    half = args.bf16 or args.fp16 or settings.model.dtype != "float32"
    if drift > getattr(objective, "beta", 1.0) * ROUNDING["half" if half else "float32"]:
        _say(
            args.process_index == 0,
            "warning: policy and reference are the same model, and should have an accuracy of 0.5 and a margin of 0 "
            f"before the first step; they have {before[f'{TRAINING}_accuracy']:.3f} and "
            f"{before[f'{TRAINING}_margin']:.3g}, with implicit rewards of {drift:.3g} on average",
        )


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
