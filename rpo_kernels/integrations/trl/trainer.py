"""RPO on TRL's `DPOTrainer`: groups of responses with rewards, and any objective of this package."""

import copy
import inspect
import json
from dataclasses import dataclass, field, fields
from typing import Any

import datasets
import torch
import transformers
import trl
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import logging

from ... import objectives
from ...objectives import Objective
from ...preference import RPOOutput, preference_loss
from ...sequences import Groups, find_groups
from ...shared_prompts import attention_mask, check_shared_prompts
from .data import GroupCollator, tokenize_groups
from .patching import patched

logger = logging.get_logger(__name__)
# What RPOTrainer overrides of DPOTrainer, with the parameters that it relies on.
_OVERRIDDEN = {
    "_prepare_dataset": ["self", "dataset", "processing_class", "args", "dataset_name"],
    "_precompute_ref_logps": ["self", "dataset", "name", "batch_size"],
    "compute_ref_log_probs": ["self", "model", "inputs"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
}
# Settings of DPOConfig that belong to its own losses.
_OF_DPO = ("loss_type", "loss_weights", "ld_alpha", "f_divergence_type", "label_smoothing", "use_weighting")


@dataclass
class RPOConfig(trl.DPOConfig):
    """`DPOConfig` with an objective of this package in place of TRL's losses.

    Attributes:
        objective: name of a preset (`rpo_kernels.objectives.PRESETS`); `RPOTrainer(objective=...)` takes any other.
        beta: of the objective; None: the objective's own default.
        objective_kwargs: its other parameters, as a dict or a JSON string: `{"eta": 0.5, "distance": "sq"}`.
        reward_columns: columns of the data that hold the rewards of `chosen` and `rejected`, where it has those.
        memory_budget, gradient_filter: as in `linear_token_logprobs`.
        shared_prompts: `"auto"`, `"on"` or `"off"`: compute each prompt once for its responses, without padding, where
            that is exact (`rpo_kernels.shared_prompts`); `"on"` is an error elsewhere.
    """

    _VALID_DICT_FIELDS = trl.DPOConfig._VALID_DICT_FIELDS + ["objective_kwargs"]

    beta: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Implicit reward per unit of log-ratio; by default the objective's own."}
    )
    objective: str = field(default="rpo", metadata={"help": "Name of the objective."})
    objective_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Parameters of the objective beside beta, as JSON."}
    )
    reward_columns: list[str] = field(
        default_factory=lambda: ["chosen_reward", "rejected_reward"],
        metadata={"help": "Columns with the rewards of chosen and rejected."},
    )
    memory_budget: str | None = field(default=None, metadata={"help": "Memory of the LM head's pass, as 512MB."})
    shared_prompts: str = field(
        default="auto", metadata={"help": "Compute each prompt once for its responses: auto, on or off."}
    )
    gradient_filter: float | None = field(
        default=None, metadata={"help": "Leave columns of the vocabulary out whose gradients are all below this."}
    )

    def make_objective(self) -> Objective:
        """The objective that the settings describe.

        Raises:
            ValueError: for an unknown name, or a parameter that it does not have or that is out of range.
        """
        if self.objective not in objectives.PRESETS:
            raise ValueError(f"objective must be one of {sorted(objectives.PRESETS)}, got {self.objective!r}")
        preset = objectives.PRESETS[self.objective]
        options = self.objective_kwargs or {}
        options = json.loads(options) if isinstance(options, str) else options
        if self.beta is not None:
            options = {"beta": self.beta} | options
        takes = list(inspect.signature(preset).parameters)
        if unknown := sorted(set(options) - set(takes)):
            raise ValueError(f"objective {self.objective!r} takes {takes}, not {unknown}")
        return preset(**options)


class RPOTrainer(trl.DPOTrainer):
    """Trains on groups of responses to a prompt with rewards; otherwise as TRL's `DPOTrainer`.

    The data hold, beside `prompt` (text or messages), either `responses` and `rewards`, two lists of any length of at
    least one, or `chosen` and `rejected` with their rewards in `args.reward_columns`. Without rewards, objectives that
    only use which response is best (`DPO()`, `IPO()`, `SimPO()`) take the chosen one as such.

    The log-probabilities come from TRL's fused LM head, computed by this package's operators whether or not `patch`
    was called. Logs have TRL's names, with the best and the worst response by reward as chosen and rejected;
    `rewards/accuracies` is over all pairs of unequal reward, where a tie counts one half.

    Args:
        model, ref_model, processing_class, kwargs: as `DPOTrainer`'s.
        args: settings; batch sizes count groups.
        objective: `RPO(...)`, a preset or any callable that `preference_loss` takes; None: the one `args` names.

    Raises:
        RuntimeError: if this version of TRL has a `DPOTrainer` with other methods than those known here.
        ValueError: for settings of TRL's own DPO losses, vision data, or data that do not fit.
    """

    _name = "RPO"
    _tag_names = ["trl", "rpo"]  # noqa: RUF012

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: RPOConfig | None = None,
        objective: Objective | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        _check_version()
        args = RPOConfig("RPO") if args is None else copy.copy(args)
        _check_settings(args)
        self.objective = args.make_objective() if objective is None else objective
        self.reference_free = getattr(self.objective, "reference_free", False)
        # DPOTrainer then loads no reference model.
        args.precompute_ref_log_probs = args.precompute_ref_log_probs or (self.reference_free and ref_model is None)
        if processing_class is None:
            processing_class = _load_tokenizer(model, args)
        if processing_class.pad_token is None:
            processing_class.pad_token = processing_class.eos_token
        kwargs.setdefault(
            "data_collator",
            GroupCollator(
                processing_class.pad_token_id, args.max_length, args.truncation_mode, args.pad_to_multiple_of
            ),
        )
        self._most_responses = 0
        super().__init__(model, ref_model, args=args, processing_class=processing_class, **kwargs)
        if isinstance(self.data_collator, GroupCollator):
            self.data_collator.shared_prompts = self._may_share(args.shared_prompts)

    def _may_share(self, wanted: str) -> bool:
        if wanted == "off":
            return False
        models = [self.model] if self.ref_model is None else [self.model, self.ref_model]
        try:
            if self.aux_loss_enabled:
                raise ValueError("the auxiliary loss of experts counts tokens")
            for model in models:
                check_shared_prompts(self.accelerator.unwrap_model(model))
        except ValueError as error:
            if wanted == "on":
                raise
            logger.warning(f"{error}; each response is computed with its own prompt, padded")
            return False
        return True

    # ----------------------------------------------------------------------------------------------------------- data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: RPOConfig, dataset_name: str) -> Any:
        """Tokenised groups."""
        ranking_only = getattr(self.objective, "target_margin", None) is not None
        columns = tuple(args.reward_columns)
        dataset = tokenize_groups(dataset, processing_class, columns, ranking_only, args, dataset_name)
        if args.precompute_ref_log_probs and isinstance(dataset, datasets.Dataset) and not self.reference_free:
            self._most_responses = max(self._most_responses, *map(len, dataset["rewards"]))
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:  # type: ignore[has-type]
            self._signature_columns = ["prompt_ids", "responses_ids", "rewards", "ref_logps"]

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """The parent's pass and cache: for it, all responses of a group, padded, are the chosen one's value."""
        if self.reference_free:
            return dataset
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        return dataset.remove_columns("ref_rejected_logps").rename_column("ref_chosen_logps", "ref_logps")

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The reference's log-probability of each response as `[groups, most responses]`, and zeros `[groups]`."""
        logps = _groups(inputs).gather(self._ref_logps(model, inputs))
        padded = nn.functional.pad(logps, (0, self._most_responses - logps.shape[1]))
        return padded, padded.new_zeros(len(padded))

    def _ref_logps(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The reference's log-probability of each response, `[B]`."""
        model_inputs = {**_model_inputs(model, inputs), "completion_mask": inputs["completion_mask"]}
        outputs: list[Any] = []

        def keep(**arguments: Any) -> Any:
            outputs.append(model(**arguments))
            return outputs[-1]

        with patched(self.args.memory_budget, self.args.gradient_filter):
            super().compute_ref_log_probs(keep, model_inputs)  # its sums are those of pairs
        length = inputs["completion_mask"].shape[1] - 1
        return _by_response(outputs[0].log_probs, length, inputs).sum(-1)

    # ----------------------------------------------------------------------------------------------------------- loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's mean over the groups of a batch."""
        model_inputs = _model_inputs(model, inputs)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        with patched(self.args.memory_budget, self.args.gradient_filter):
            outputs = model(
                **model_inputs,
                **({"output_router_logits": True} if self.aux_loss_enabled else {}),
                use_cache=False,
                labels=labels,
                fused_lm_head=True,
            )
        length = labels.shape[1] - 1
        labels = _by_response(labels, length, inputs, -100)
        figures = {
            name: _by_response(getattr(outputs, name), length, inputs)
            for name in ("log_probs", "entropy", "is_top1", "mean_logits")
        }
        result = preference_loss(
            figures["log_probs"],
            labels,
            inputs["rewards"],
            ref_logps=self._reference(inputs),
            objective=self.objective,
            group_ids=inputs["group_ids"].cpu(),
        )
        loss = result.loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
            figures["aux_loss"] = outputs.aux_loss
        self._record(result, figures, labels, inputs)
        if not return_outputs:
            return loss
        with torch.no_grad():  # the fused head makes no logits
            return loss, model(**model_inputs, use_cache=False)

    def _reference(self, inputs: dict[str, Any]) -> Tensor | None:
        if self.reference_free:
            return None
        if self.precompute_ref_logps:
            return inputs["ref_logps"]
        return self._ref_logps(self.ref_model or self.model, inputs)

    def _record(self, result: RPOOutput, of_tokens: dict[str, Tensor], labels: Tensor, inputs: dict[str, Any]) -> None:
        """Add a batch's figures to those that `log` averages, over all processes."""
        groups, scored = _groups(inputs), labels != -100
        best, worst = _best_and_worst(groups, inputs["rewards"])
        logps = result.logps.detach()
        figures = {
            "rewards/chosen": result.implicit_rewards[best].mean(),
            "rewards/rejected": result.implicit_rewards[worst].mean(),
            "rewards/accuracies": result.accuracy,
            "rewards/margins": result.margin,
            "logps/chosen": logps[best].mean(),
            "logps/rejected": logps[worst].mean(),
            "entropy": _mean(of_tokens["entropy"], scored),
            "mean_token_accuracy": _mean(of_tokens["is_top1"], scored, best),
            "logits/chosen": _mean(of_tokens["mean_logits"], scored, best),
            "logits/rejected": _mean(of_tokens["mean_logits"], scored, worst),
        }
        if self.aux_loss_enabled:
            figures["aux_loss"] = of_tokens["aux_loss"].detach()
        stacked = torch.stack([value.float() for value in figures.values()])
        gathered = self.accelerator.gather(stacked).view(-1, len(figures))
        training = self.model.training
        metrics = self._metrics["train" if training else "eval"]
        for name, value in zip(figures, gathered.nanmean(0).tolist()):
            if value == value:  # NaN: no pairs in this batch
                metrics[name].append(value)
        if training:
            tokens = inputs["num_tokens"] if "num_tokens" in inputs else inputs["attention_mask"].sum()
            tokens = self.accelerator.gather(tokens).sum().item()
            self._total_train_tokens += tokens // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]


def _groups(inputs: dict[str, Any]) -> Groups:
    rewards = inputs["rewards"]
    return find_groups(len(rewards), 0, "grouped", inputs["group_ids"].cpu(), rewards.device)


def _best_and_worst(groups: Groups, rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Which sequences have the largest and the smallest reward of each group, `[G]` each; the first of a tie."""
    assert groups.index is not None and groups.present is not None
    values = groups.gather(rewards)
    best = values.masked_fill(~groups.present, -torch.inf).argmax(-1, keepdim=True)
    worst = values.masked_fill(~groups.present, torch.inf).argmin(-1, keepdim=True)
    return groups.index.gather(1, best).squeeze(1), groups.index.gather(1, worst).squeeze(1)


def _mean(values: Tensor, scored: Tensor, sequences: Tensor | None = None) -> Tensor:
    """Mean of a figure over the scored tokens of some sequences; NaN if there are none."""
    values = values.detach()
    if sequences is not None:
        values, scored = values[sequences], scored[sequences]
    return (values * scored).sum() / scored.sum()


def _model_inputs(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    if "cu_seqlens" not in inputs:
        return {name: inputs[name] for name in ("input_ids", "attention_mask")}
    shared = {name: inputs[name] for name in ("input_ids", "position_ids")}
    return shared | {"attention_mask": attention_mask(model, inputs)}


def _by_response(values: Tensor, length: int, inputs: dict[str, Any], fill: float = 0) -> Tensor:
    """Figures of the tokens but the first as `[B, T]`, a row for each response; from `[1, T]` with shared prompts."""
    values = values[:, -length:]  # prompt learning prepends positions
    if "cu_seqlens" not in inputs:
        return values
    lengths = inputs["cu_seqlens"].diff().tolist()
    lengths[0] -= 1
    return pad_sequence(values[0].split(lengths), batch_first=True, padding_value=fill)


def _load_tokenizer(model: Any, args: RPOConfig) -> Any:
    options = args.model_init_kwargs or {}
    return transformers.AutoTokenizer.from_pretrained(
        model if isinstance(model, str) else model.config._name_or_path,
        revision=options.get("revision"),
        trust_remote_code=args.trust_remote_code,
    )


def _check_settings(args: RPOConfig) -> None:
    if not isinstance(args, RPOConfig):
        raise ValueError(f"args must be an RPOConfig, got {type(args).__name__}")
    defaults = {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(args)}  # type: ignore[misc]
    changed = [name for name in _OF_DPO if getattr(args, name) != defaults[name]]
    if changed:
        raise ValueError(f"args sets {changed}, which belong to TRL's DPO losses; set objective and objective_kwargs")


def _check_version() -> None:
    for name, expected in _OVERRIDDEN.items():
        method = getattr(trl.DPOTrainer, name, None)
        found = None if method is None else list(inspect.signature(method).parameters)
        if found != expected:
            raise RuntimeError(
                f"RPOTrainer is written for TRL 1.15 and 1.16 and does not know {trl.__version__}: DPOTrainer.{name} "
                f"takes {found}, where {expected} was expected"
            )
