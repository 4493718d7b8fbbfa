"""Settings of `rpo-kernels train`: flags, a YAML file, or both."""

import json
from argparse import Action, ArgumentDefaultsHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from ..head.budget import parse_budget
from .settings import (
    DESCRIPTION,
    USAGE,
    DataArguments,
    ModelArguments,
    ObjectiveArguments,
    RunArguments,
    TrainingDefaults,
)


@dataclass
class RPOArguments(TrainingDefaults, TrainingArguments):
    """`transformers.TrainingArguments` with defaults that fit; batch sizes count groups."""

    dataloader_pin_memory: bool = field(
        default=torch.accelerator.is_available(), metadata={"help": "Pin memory of the batches."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Must be False: the loss needs columns the model does not."}
    )
    do_train: bool = field(default=True, metadata={"help": "Must be True: training is all that the command does."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Must be False: a run stops at the first loss that is not finite."}
    )


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
        self.exit(2, f"rpo-kernels train: error: {message}\n(rpo-kernels train --help lists the settings)\n")


def _flag(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if name.replace("-", "_") == "shared_prompts" and isinstance(value, bool):
        value = "on" if value else "off"  # which YAML reads as true and false
    values = value if isinstance(value, list) else [value]
    return [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]


def check_run(run: RunArguments) -> None:
    """ValueError for what cannot be read, is out of range, or would be ignored."""
    if run.max_tokens is not None and run.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {run.max_tokens}")
    parse_budget(run.memory_budget, torch.device("cpu"))
    if run.gradient_filter is not None and not run.gradient_filter >= 0:
        raise ValueError(f"gradient_filter must be at least 0, got {run.gradient_filter}")
    if run.loss_from == "logits" and (run.memory_budget is not None or run.gradient_filter is not None):
        raise ValueError("memory_budget and gradient_filter need the loss from hidden states; loss_from is 'logits'")


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
        check_run(settings.run)
    except ValueError as error:
        parser.error(str(error))
    return settings, demo
