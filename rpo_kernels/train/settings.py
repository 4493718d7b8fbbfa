"""The settings of `rpo-kernels train` beside transformers' own. Imports nothing heavy: `--help` reads this file."""

import inspect
from argparse import ArgumentParser
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

if TYPE_CHECKING:
    from ..objectives import Objective

USAGE = "rpo-kernels train [config.yaml] [--flag value ...]"
DESCRIPTION = """Train a causal language model on preference data. Without --model and --train-data: the embedded
demonstration. Every flag may also be a line of the YAML file (flags win), and be spelt with dashes or underscores."""

EPILOG = """Every other argument of transformers.TrainingArguments is taken too, such as --gradient-accumulation-steps,
--max-steps, --lr-scheduler-type, --warmup-steps, --bf16, --gradient-checkpointing, --eval-strategy, --save-steps,
--save-total-limit, --report-to and --seed. All of them: rpo-kernels train --help-all"""


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
    adapter: Literal["continue", "merge"] | None = _setting(
        None, "Where --model is a LoRA adapter: train it further, or fold it into its base model first."
    )
    disable_dropout: bool = _setting(
        True, "Switch the model's dropout off in training, so that policy and reference compute the same."
    )


@dataclass
class DataArguments:
    """Which data, and how long."""

    _argument_group_name = "data"
    train_data: str | None = _setting(
        None, "Training data: a JSONL file, gzipped or not, or a directory written by datasets."
    )
    eval_data: str | None = _setting(None, "Held-out data, for evaluation before, during and after training.")
    max_length: int | None = _setting(
        None,
        "Tokens of prompt and response together, at most; what is over is cut. "
        "Default: 1024, or the model's positions if fewer.",
    )
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
    epsilon: float | None = _setting(None, "cdpo: probability that a label is wrong.")
    gamma: float | None = _setting(None, "rpo, simpo: lead of the best response before it counts.")

    def build(self) -> "Objective":
        """The objective.

        Raises:
            ValueError: for a parameter that the objective does not have, or out of range.
        """
        from ..objectives import PRESETS

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
    resume: bool = _setting(
        False, "Continue from the newest complete checkpoint in --output-dir, or start if there is none."
    )
    extend: bool = _setting(False, "With --resume: let --max-steps and --num-train-epochs differ from the run's.")
    overwrite: bool = _setting(False, "Remove an earlier run from --output-dir and start from the beginning.")
    plot: bool = _setting(False, "Write the curves to curves.png in --output-dir.")
    shared_prompts: Literal["auto", "on", "off"] = _setting(
        "auto", "Compute each prompt once for all its responses, without padding; auto: where that is exact."
    )
    max_tokens: int | None = _setting(
        None, "Tokens of a micro-batch, at most: splits a device's groups; a larger group is computed alone."
    )
    loss_from: Literal["auto", "head", "logits"] = _setting(
        "auto", "Compute the loss from hidden states and the LM head, or from logits; auto: head where possible."
    )
    memory_budget: str | None = _setting(
        None, "Memory of the loss from hidden states, as 512MB; default: a quarter of the free memory."
    )
    gradient_filter: float | None = _setting(
        None,
        "Leave out columns of the head's gradient whose entries are all below this, as 1.5e-5.",
    )
    cache_dir: str | None = _setting(
        None, "Where tokenised data and the reference's log-probabilities are kept (default: ~/.cache/rpo_kernels)."
    )


@dataclass
class TrainingDefaults:
    """Arguments of transformers that have another default or meaning here."""

    _argument_group_name = "training (transformers.TrainingArguments; batch sizes count groups)"
    output_dir: str | None = _setting("rpo-output", "Where the model, checkpoints, metrics and plot are written.")
    per_device_train_batch_size: int = _setting(2, "Groups per device and micro-batch.")
    per_device_eval_batch_size: int = _setting(4, "Groups per device and batch of evaluation.")
    learning_rate: float = _setting(1e-6, "Initial learning rate. LoRA wants about 1e-4.")
    num_train_epochs: float = _setting(1.0, "Passes over the training data.")
    logging_steps: float = _setting(1, "Steps between two logs.")


GROUPS = (ModelArguments, DataArguments, ObjectiveArguments, RunArguments, TrainingDefaults)


def help_text() -> str:
    """The settings of this package with their defaults, as text."""
    parser = ArgumentParser(usage=USAGE, description=DESCRIPTION, epilog=EPILOG, add_help=False)
    for group in GROUPS:
        section = parser.add_argument_group(group._argument_group_name)
        for setting in fields(group):
            default = setting.default_factory() if setting.default_factory is not MISSING else setting.default
            shown = "" if default is None or default is False else f" (default: {_text(default)})"
            values: dict[str, Any] = {"action": "store_true"} if setting.type is bool else {"metavar": _values(setting)}
            help = setting.metadata["help"] + shown
            section.add_argument(f"--{setting.name.replace('_', '-')}", help=help, **values)
    return parser.format_help()


def _values(setting: Field) -> str:
    """What may follow the flag: its choices, or any value."""
    kinds = (setting.type, *get_args(setting.type))  # X | None holds X
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    return "VALUE" if choices is None else "{" + ",".join(choices) + "}"


def _text(default: Any) -> str:
    return " ".join(default) if isinstance(default, list) else str(default)
