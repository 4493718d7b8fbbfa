"""Settings of `rpo-kernels train`: flags, a YAML file, or both."""

import inspect
import json
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..objectives import PRESETS, Objective
from ..plan import parse_budget

USAGE = "rpo-kernels train [config.yaml] [--flag value ...]"
DESCRIPTION = """Train a causal language model on preference data. Without --model and --train-data: the embedded
demonstration. Every flag may also be a line of the YAML file (flags win), and be spelt with dashes or underscores."""


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ModelArguments:
    """Which model, in which precision, and what of it is trained."""

    _argument_group_name = "model"
    model: str | None = _setting(None, "Model to train: a directory, a hub id or a .gguf file.")
    ref_model: str | None = _setting(None, "Reference model; by default the model itself as it is before training.")
    dtype: Literal["float32", "bfloat16", "float16"] = _setting(
        "float32", "Type of the weights. For mixed precision keep float32 and give --bf16."
    )
    lora_rank: int = _setting(0, "Rank of a LoRA adapter to train instead of all weights; 0: none.")
    lora_alpha: float | None = _setting(None, "LoRA's scale; by default twice the rank.")
    lora_targets: list[str] = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "Names of the modules that LoRA adapts."}
    )


@dataclass
class DataArguments:
    """Which data, and how long."""

    _argument_group_name = "data"
    train_data: str | None = _setting(None, "Training data: a JSONL file or a directory written by datasets.")
    eval_data: str | None = _setting(None, "Held-out data, for evaluation before, during and after training.")
    max_length: int = _setting(1024, "Tokens of prompt and response together, at most; what is over is cut.")
    max_train_groups: int | None = _setting(None, "Use only the first groups of the training data.")
    max_eval_groups: int | None = _setting(None, "Use only the first groups of the held-out data.")

    def check(self) -> None:
        """ValueError for a number out of range."""
        for name, least in (("max_length", 2), ("max_train_groups", 1), ("max_eval_groups", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")


@dataclass
class ObjectiveArguments:
    """Which objective; a parameter left out has the objective's own default."""

    _argument_group_name = "objective"
    objective: Literal["rpo", "dpo", "cdpo", "ipo", "simpo", "distilled_dpo"] = _setting(
        "rpo", "Name of the objective."
    )
    distance: Literal["bwd_kl", "fwd_kl", "sq"] | None = _setting(None, "rpo: distance between rewards and targets.")
    beta: float | None = _setting(None, "Implicit reward per unit of log-ratio.")
    eta: float | None = _setting(None, "rpo, distilled_dpo: target per unit of reward.")
    length_normalize: bool = _setting(False, "rpo: divide log-ratios by the response's length.")
    reference_free: bool = _setting(False, "rpo: use the policy's log-probability alone.")
    target_margin: float | None = _setting(None, "rpo: a fixed target for the best response, whatever the rewards.")
    margin: float | None = _setting(None, "rpo: lead of the best response before it counts.")
    epsilon: float | None = _setting(None, "cdpo: probability that a label is wrong.")
    gamma: float | None = _setting(None, "simpo: target margin.")

    def build(self) -> Objective:
        """The objective.

        Raises:
            ValueError: for a parameter that the objective does not have, or out of range.
        """
        make = PRESETS[self.objective]
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "objective"}
        given = {name: value for name, value in given.items() if value is not None and value is not False}
        takes = list(inspect.signature(make).parameters)
        if unknown := sorted(set(given) - set(takes)):
            raise ValueError(f"objective {self.objective!r} takes {takes}, not {unknown}")
        return make(**given)


@dataclass
class RunArguments:
    """What surrounds the training."""

    _argument_group_name = "run"
    resume: bool = _setting(False, "Continue from the last checkpoint in --output-dir, or start if there is none.")
    plot: bool = _setting(False, "Write the curves to curves.png in --output-dir.")
    loss_level: Literal["auto", "head", "logits"] = _setting(
        "auto", "Compute the loss from hidden states and the LM head, or from logits; auto: head where possible."
    )
    memory_budget: str | None = _setting(
        None, "Memory of the loss at the head level, as 512MB; default: a quarter of what is free."
    )
    gradient_filter: float | None = _setting(
        None, "Head level: leave columns out of a chunk's gradient whose entries are all below this, as 1.5e-5."
    )
    cache_dir: str | None = _setting(
        None, "Where the reference's log-probabilities are kept (default: ~/.cache/rpo_kernels/reference)."
    )

    def check(self) -> None:
        """ValueError for what cannot be read, is out of range, or would be ignored."""
        parse_budget(self.memory_budget, torch.device("cpu"))
        if self.gradient_filter is not None and not self.gradient_filter >= 0:
            raise ValueError(f"gradient_filter must be at least 0, got {self.gradient_filter}")
        if self.loss_level == "logits" and (self.memory_budget is not None or self.gradient_filter is not None):
            raise ValueError("memory_budget and gradient_filter are the head level's; loss_level is 'logits'")


@dataclass
class RPOArguments(TrainingArguments):
    """`transformers.TrainingArguments` with defaults that fit; batch sizes count groups."""

    _argument_group_name = "training (transformers.TrainingArguments; batch sizes count groups)"
    output_dir: str | None = _setting("rpo-output", "Where the model, checkpoints, metrics and plot are written.")
    per_device_train_batch_size: int = _setting(2, "Groups per device and micro-batch.")
    per_device_eval_batch_size: int = _setting(4, "Groups per device and batch of evaluation.")
    learning_rate: float = _setting(1e-6, "Initial learning rate. LoRA wants about 1e-4.")
    num_train_epochs: float = _setting(1.0, "Passes over the training data.")
    logging_steps: float = _setting(1, "Steps between two logs.")
    dataloader_pin_memory: bool = _setting(torch.accelerator.is_available(), "Pin memory of the batches.")
    remove_unused_columns: bool = _setting(False, "Must be False: the loss needs columns the model does not.")


class Settings(NamedTuple):
    """All settings of a run."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    run: RunArguments
    training: RPOArguments


class _Help(ArgumentDefaultsHelpFormatter):
    """Names each flag once, and a default only where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: Action) -> str:
        values = "" if action.nargs == 0 else self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{action.option_strings[-1]} {values}"

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(HfArgumentParser):
    """HfArgumentParser that takes a YAML file first, and refuses unknown settings."""

    def __init__(self) -> None:
        super().__init__(
            list(Settings.__annotations__.values()),
            usage=USAGE,
            description=DESCRIPTION,
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def settings(self, argv: Sequence[str]) -> Settings:
        """Parse; on a mistake, print what it is and exit with status 2."""
        try:
            *parsed, unknown = self.parse_args_into_dataclasses(
                [*argv], return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as error:  # of TrainingArguments
            self.error(str(error))
        if unknown:
            self.error(f"unknown arguments: {' '.join(unknown)}")
        return Settings(*parsed)

    def expand(self, argv: Sequence[str]) -> list[str]:
        """Replace a leading YAML file by its settings, as flags."""
        if not argv or argv[0].startswith("-"):
            return [*argv]
        path = Path(argv[0])
        if path.suffix not in (".yaml", ".yml"):
            self.error(f"expected a .yaml file or a --flag first, got {argv[0]!r}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            self.error(f"cannot read {path}: {error}")
        if not isinstance(content, dict):
            self.error(f"{path}: expected 'name: value' lines, got {type(content).__name__}")
        return [word for name, value in content.items() for word in _flag(name, value)] + list(argv[1:])

    def error(self, message: str) -> NoReturn:
        """One line and a hint; the usage of 150 flags would hide it."""
        self.exit(2, f"rpo-kernels train: error: {message}\n(rpo-kernels train --help lists all settings)\n")


def _flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]


def parse(argv: Sequence[str], demonstration: Sequence[str]) -> tuple[Settings, bool]:
    """Settings from the command line, and whether they are those of the demonstration.

    Args:
        argv: what follows `rpo-kernels train`.
        demonstration: flags that come first where neither a model nor training data is given.
    """
    parser = Parser()
    argv = parser.expand(argv)
    settings = parser.settings(argv)
    given = [settings.model.model is not None, settings.data.train_data is not None]
    if any(given) and not all(given):
        parser.error("give both --model and --train-data, or neither for the demonstration")
    demo = not any(given)
    if demo:
        settings = parser.settings([*demonstration, *argv])
    try:
        settings.objective.build()
        settings.data.check()
        settings.run.check()
    except ValueError as error:
        parser.error(str(error))
    return settings, demo
