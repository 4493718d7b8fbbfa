"""Checks before any work is done: settings, model and tokenizer, data against model."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from transformers import PreTrainedConfig, PreTrainedTokenizerBase, Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_liger_kernel_available

from ..integrations.model_head import find_head
from . import checkpoints, models
from .config import RPOArguments, Settings
from .dataset import PreferenceDataset
from .errors import RunError
from .metrics import METRIC_NAMES

DEFAULT_MAX_LENGTH = 1024


class SettingError(Exception):
    """An invalid setting: its name, the given value and the possible ones."""


# Arguments of transformers that would have another effect in this trainer than documented, with the reason.
_FIXED = {
    "label_smoothing_factor": (0.0, "smooth preferences with --objective cdpo --epsilon"),
    "do_train": (True, "training is all that the command does"),
    "do_predict": (False, "there is nothing to predict"),
    "prediction_loss_only": (False, "evaluation reports more than the loss"),
    "batch_eval_metrics": (False, "metrics are taken over all groups"),
    "include_for_metrics": ([], "metrics are this package's own"),
    "label_names": (None, "labels are made from prompts and responses"),
    "length_column_name": ("length", "examples are not columns"),
    "average_tokens_across_devices": (True, "the loss is a mean over groups"),
    "remove_unused_columns": (False, "the loss needs columns that the model does not"),
    "logging_nan_inf_filter": (False, "a run stops at the first loss that is not finite"),
    "bf16_full_eval": (False, "it casts the trained weights"),
    "fp16_full_eval": (False, "it casts the trained weights"),
    "ignore_data_skip": (False, "a resumed run would see other data"),
    "auto_find_batch_size": (False, "it changes the groups of a step"),
    "enable_jit_checkpoint": (False, "checkpoints are written whole, at --save-steps"),
    "parallelism_config": (None, "groups are dealt to data-parallel processes"),
}
_LEAST: dict[str, float] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "warmup_steps": 0,
    "seed": 0,
}


def check_settings(settings: Settings) -> None:
    """Check what needs no file but those that the settings name.

    Raises:
        SettingError: naming the setting, what was given and what is possible.
    """
    args, run = settings.training, settings.run
    for name, (only, reason) in _FIXED.items():
        value = getattr(args, name, only)
        if value != only and not (only == [] and not value):
            raise SettingError(f"{name} must be {only}, got {value}: {reason}")
    for name, least in _LEAST.items():
        value = getattr(args, name)
        if not (math.isfinite(value) and value >= least):
            raise SettingError(f"{name} must be at least {least}, got {value}")
    if not (args.max_steps == -1 or args.max_steps > 0):
        raise SettingError(f"max_steps must be positive, or -1 for whole epochs; got {args.max_steps}")
    if not args.num_train_epochs > 0:
        raise SettingError(f"num_train_epochs must be positive, got {args.num_train_epochs}")
    if args.eval_strategy != "no" and settings.data.eval_data is None:
        raise SettingError(
            f"eval_strategy {str(getattr(args.eval_strategy, 'value', args.eval_strategy))!r} needs --eval-data"
        )
    _check_sampling(args)
    _check_device(settings)
    _check_lora(settings)
    if run.extend and not run.resume:
        raise SettingError("extend goes with --resume")
    if run.overwrite and (run.resume or args.resume_from_checkpoint):
        raise SettingError("overwrite removes what --resume would continue: give one of them")
    if args.torch_compile and run.loss_from != "logits":
        raise SettingError(
            "torch_compile compiles the model's forward, which gives logits: it needs --loss-from logits"
        )
    if args.resume_from_checkpoint is not None:
        unusable = checkpoints.defect(Path(args.resume_from_checkpoint))
        if unusable is not None:
            raise SettingError(f"cannot resume from {args.resume_from_checkpoint}: {unusable}")
    best = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if best not in METRIC_NAMES:
        raise SettingError(f"metric_for_best_model must be one of {list(METRIC_NAMES)}, got {best!r}")
    _check_optimizer(args)
    _check_optional_packages(args)


def _check_sampling(args: RPOArguments) -> None:
    sampling = getattr(args, "train_sampling_strategy", "random")
    if sampling not in ("random", "sequential"):
        raise SettingError(f"train_sampling_strategy must be random or sequential, got {sampling!r}")
    expected = {"split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True}
    for name, only in expected.items():
        value = getattr(args.accelerator_config, name, only)
        if value != only:
            raise SettingError(f"accelerator_config.{name} must be {only}, got {value}: groups are dealt in turn")


def _check_device(settings: Settings) -> None:
    args = settings.training
    if args.fsdp and args.device.type == "cpu":
        raise SettingError("fsdp has no effect on a CPU: accelerate would train with DDP")
    if args.fp16 and args.device.type == "cpu":
        raise SettingError("fp16 has no effect on a CPU: use --bf16, or neither")
    if args.fp16 and settings.model.dtype != "float32":
        raise SettingError(f"fp16 scales the gradients of float32 weights, and dtype is {settings.model.dtype}")


def _check_lora(settings: Settings) -> None:
    args = settings.model
    if args.lora_rank < 0:
        raise SettingError(f"lora_rank must be at least 1, or 0 for no adapter; got {args.lora_rank}")
    if args.lora_alpha is not None and not args.lora_alpha > 0:
        raise SettingError(f"lora_alpha must be positive, got {args.lora_alpha}")
    if args.adapter == "continue" and args.lora_rank:
        raise SettingError("adapter 'continue' trains the adapter that is there: leave out --lora-rank, or merge it")


def _check_optimizer(args: RPOArguments) -> None:
    """Make the optimizer, which another package may bring, and its schedule for one parameter."""
    optimizer: torch.optim.Optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    try:
        make, options = Trainer.get_optimizer_cls_and_kwargs(args)
        if make.__module__.startswith("torch."):
            optimizer = make(optimizer.param_groups[0]["params"], **options)
    except (ImportError, ValueError, RuntimeError) as error:
        raise SettingError(f"optim {getattr(args.optim, 'value', args.optim)}: {error}") from error
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 2, args.lr_scheduler_kwargs)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise SettingError(f"lr_scheduler_type {name} with {args.lr_scheduler_kwargs}: {error}") from error


def _check_optional_packages(args: RPOArguments) -> None:
    """Loggers and kernels that other packages bring, and the hub."""
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise SettingError("use_liger_kernel needs the package liger-kernel, which is not installed")
    if args.push_to_hub:
        try:
            HfApi(token=args.hub_token).whoami()
        except Exception as error:  # of the network, or of the account
            raise SettingError(f"push_to_hub: {' '.join(str(error).split())[:200]}") from error
    for callback in get_reporting_integration_callbacks(args.report_to):
        try:
            callback()
        except (ImportError, RuntimeError) as error:
            raise SettingError(f"report_to {args.report_to}: {error}") from error


def check_model(settings: Settings, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the model to train by its configuration, without its weights; settle `max_length`.

    Raises:
        RunError: naming what the model cannot do.
    """
    args, source = settings.model, str(settings.model.model)
    if config.is_encoder_decoder:
        raise RunError(
            f"{source} is an encoder-decoder ({config.model_type}); only causal language models can be trained"
        )
    if models.adapter_base(source) and args.adapter is None:
        raise RunError(
            f"{source} is a LoRA adapter: train it further with --adapter continue, or fold it into its base model "
            "with --adapter merge (and train all weights, or a new adapter with --lora-rank)"
        )
    if args.adapter and not models.adapter_base(source):
        raise RunError(f"--adapter {args.adapter}: {source} is not a LoRA adapter")
    method = models.quantised_by(config)
    if method is not None and not (args.lora_rank or source.endswith(".gguf")):
        raise RunError(f"the weights of {source} are packed ({method}): only an adapter can be trained, --lora-rank")
    model = models.without_weights(config)
    if settings.run.loss_from == "head":
        try:
            find_head(model)
        except ValueError as error:
            raise RunError(str(error)) from error
    models.add_adapter(model, args)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    positions = None if positions is None or positions < 1 else positions  # -1 of XLNet: any number
    if settings.data.max_length is None:
        settings.data.max_length = min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    elif positions is not None and settings.data.max_length > positions:
        raise RunError(f"--max-length {settings.data.max_length} is beyond the {positions} positions of {source}")
    vocabulary = config.get_text_config().vocab_size
    for name in ("pad", "bos", "eos"):
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None and token >= vocabulary:
            raise RunError(f"the tokenizer's {name} token {token} is not among the {vocabulary} tokens of {source}")


def check_data(
    args: RPOArguments,
    train: PreferenceDataset,
    others: Iterable[PreferenceDataset],
    configs: dict[str, PreTrainedConfig],
) -> None:
    """RunError if the data holds a token that one of the models, by name, does not know, or too little to train on."""
    size = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and len(train) < size:
        raise RunError(f"dataloader_drop_last leaves nothing of {len(train)} groups in batches of {size}")
    largest = max(dataset.largest_token() for dataset in (train, *others))
    for name, config in configs.items():
        vocabulary = config.get_text_config().vocab_size
        if largest >= vocabulary:
            raise RunError(f"the data holds token {largest}, and {name} knows {vocabulary}: the tokenizer is another's")


def check_cache(folder: Path) -> None:
    """RunError if the cache cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"cannot write to --cache-dir {folder}: {error}") from error
