"""`transformers.Trainer` with the RPO loss."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..objectives import RPO, Objective
from .dataset import GroupCollator, PreferenceDataset
from .loss_layer import LossLayer, preference_loss
from .metrics import GroupTable


class RPOTrainer(Trainer):
    """Trains a causal language model on groups of responses with an objective of this package.

    Logs beside the loss `accuracy`, `margin`, `logp_best`, `logp_worst`, `scored_tokens` and `dropped_tokens` (see
    `GroupTable.summary`) over the groups since the last log; `evaluate` returns the same, prefixed, over its dataset.
    The loss is the mean over all groups of an optimizer step, however they are split into micro-batches and processes.

    Args:
        model: a causal language model, which may be a PEFT model.
        args: `remove_unused_columns` must be False; batch sizes count groups.
        objective: `RPO(...)`, a preset or any callable `rpo_loss` takes.
        train_dataset, eval_dataset: with reference log-probabilities (`attach_reference_logps`), unless the objective
            is reference-free.
        processing_class: the tokenizer: saved beside the model, and its padding token pads the batches.
        loss_layer: from what the loss is computed; None: from hidden states and LM head where the model allows it.
        kwargs: passed on to `transformers.Trainer`.

    Raises:
        ValueError: if the datasets lack the reference log-probabilities, or `args` would drop the batch's columns.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        args: TrainingArguments,
        objective: Objective = RPO(),
        train_dataset: PreferenceDataset | None = None,
        eval_dataset: PreferenceDataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        loss_layer: LossLayer | None = None,
        **kwargs: Any,
    ):
        if args.remove_unused_columns:
            raise ValueError("args.remove_unused_columns must be False: the loss needs columns that the model does not")
        if args.n_gpu > 1:  # Trainer would use nn.DataParallel, which splits batches without regard to groups
            message = "one process trains on one GPU; start one for each with torchrun or accelerate launch"
            warnings.warn(message, stacklevel=2)
            args._n_gpu = 1
        self.objective: Objective = objective
        self.loss_layer = loss_layer or LossLayer.of(model)
        pad = getattr(processing_class, "pad_token_id", None)
        kwargs.setdefault("data_collator", GroupCollator(0 if pad is None else pad))
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=_evaluation_summary,
            **kwargs,
        )
        # Tells every version of Trainer that `compute_loss` already divides by the accumulated number of items.
        self.model_accepts_loss_kwargs = True
        self._tables: list[GroupTable] = []

    def get_train_dataloader(self) -> Any:
        """The training batches."""
        self._check_reference(self.train_dataset)
        return super().get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Dataset | str | None = None) -> Any:
        """The evaluation batches."""
        self._check_reference(self.eval_dataset if eval_dataset is None else eval_dataset)
        return super().get_eval_dataloader(eval_dataset)

    def _check_reference(self, dataset: Any) -> None:
        if getattr(self.objective, "reference_free", False) or not isinstance(dataset, PreferenceDataset):
            return
        missing = sum(example.ref_logps is None for example in dataset.examples)
        if missing:
            raise ValueError(
                f"{missing} of {len(dataset)} groups have no reference log-probabilities, which the objective needs: "
                "call attach_reference_logps on the dataset before training"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimizer step, and how many groups they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        groups = torch.tensor(sum(len(batch["group_sizes"]) for batch in batches), device=device)
        return batches, self.accelerator.reduce(groups, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The micro-batch's share of the mean loss over `num_items_in_batch` groups, or its own mean without that."""
        output = preference_loss(model, inputs, self.objective, self.loss_layer)
        loss = output.loss
        if num_items_in_batch is not None:
            # DDP averages gradients over processes.
            loss = loss * len(inputs["group_sizes"]) * self.accelerator.num_processes / num_items_in_batch
        if model.training and self.args.logging_strategy != "no":
            self._tables.append(GroupTable.of(output, inputs))
        return (loss, output) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision around the whole loss: accelerate wraps the model's forward, not what follows it."""
        return self.accelerator.autocast()

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The batch's figures per group, for Trainer to gather over batches and processes."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            table = GroupTable.of(preference_loss(model, inputs, self.objective, self.loss_layer), inputs)
        return None, tuple(table), table.present

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the summary of the groups trained on since the last log."""
        if "loss" in logs:
            # Every process logs at the same step, so all take part in gathering.
            tables = gather_object([GroupTable.join(self._tables)] if self._tables else [])
            self._tables.clear()
            if tables:
                logs = {**GroupTable.join(tables).summary(), **logs}
        super().log(logs, start_time)


def _evaluation_summary(prediction: EvalPrediction) -> dict[str, float]:
    return GroupTable(*(torch.as_tensor(column) for column in prediction.predictions)).summary()
