"""`transformers.Trainer` with the RPO loss."""

import math
import os
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints

from ..objectives import RPO, Objective
from . import checkpoints
from .batches import BatchForm
from .collator import IGNORE_INDEX
from .dataset import PreferenceDataset
from .errors import NonFiniteError, RunError
from .loss_layer import LossLayer, preference_loss
from .metrics import GroupTable, Speed


class RPOTrainer(Trainer):
    """Trains a causal language model on groups of responses with an objective of this package.

    Logs beside the loss `accuracy`, `margin`, `logp_best`, `logp_worst`, `scored_tokens` and `truncated_tokens` (see
    `GroupTable.summary`) over the groups since the last log; `evaluate` returns the same, prefixed, over its dataset.
    Training logs `tokens_per_second` and `tokens_saved` too (see `Speed.summary`).
    The loss is the mean over all groups of an optimizer step, however they are split into micro-batches and processes.
    Training stops with a `NonFiniteError` before the first update by a loss or gradient that is not finite.

    Args:
        model: a causal language model, which may be a PEFT model.
        args: `remove_unused_columns` must be False; batch sizes count groups.
        objective: `RPO(...)`, a preset or any callable `rpo_loss` takes.
        train_dataset, eval_dataset: with reference log-probabilities (`attach_reference_logps`), unless the objective
            is reference-free.
        processing_class: the tokenizer: saved beside the model, and its padding token pads the batches.
        loss_layer: from what the loss is computed; None: from hidden states and LM head where the model allows it.
        identity: recorded with each checkpoint; see `identity.run_identity`.
        batch_form: how groups become micro-batches; None: with shared prompts where they are exact, else padded.
        kwargs: passed on to `transformers.Trainer`.

    Raises:
        ValueError: if the datasets lack the reference log-probabilities, or `args` asks for what it cannot do.
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
        batch_form: BatchForm | None = None,
        identity: dict | None = None,
        **kwargs: Any,
    ):
        if args.remove_unused_columns:
            raise ValueError("args.remove_unused_columns must be False: the loss needs columns that the model does not")
        if args.bf16_full_eval or args.fp16_full_eval:
            raise ValueError("args.bf16_full_eval and args.fp16_full_eval must be False: they cast the trained weights")
        if args.n_gpu > 1:  # Trainer would use nn.DataParallel, which splits batches without regard to groups
            message = "one process trains on one GPU; start one for each with torchrun or accelerate launch"
            warnings.warn(message, stacklevel=2)
            args._n_gpu = 1
        self.objective: Objective = objective
        self.loss_layer = loss_layer or LossLayer.of(model)
        self.identity = identity or {}
        pad = getattr(processing_class, "pad_token_id", None)
        self.batch_form = batch_form or BatchForm.of(model, pad_token_id=0 if pad is None else pad)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            data_collator=self.batch_form,
            compute_metrics=_evaluation_summary,
            **kwargs,
        )
        if self.is_deepspeed_enabled:
            if self.batch_form.max_tokens is not None:
                raise ValueError("max_tokens does not go with DeepSpeed, which counts a step's micro-batches itself")
            self.data_collator = self.batch_form = replace(self.batch_form, dense=False)
        # Tells every version of Trainer that `compute_loss` already divides by the accumulated number of items.
        self.model_accepts_loss_kwargs = True
        self._tables: list[GroupTable] = []  # of the groups trained on since the last log
        self._speed = Speed()
        self._step: list[tuple[dict, Tensor]] = []  # the step's micro-batches and the losses of their groups
        self._has_trained = False
        self._aside: Path | None = None  # where a checkpoint is being written

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, as `transformers.Trainer.train` does."""
        if not self._has_trained:
            self._forget_preparation()
        self._has_trained = True
        return super().train(*args, **kwargs)

    def _forget_preparation(self) -> None:
        """Have accelerate prepare the model again.

        An evaluation before training prepares it for evaluation, and accelerate prepares a model once: training would
        go on without DDP, each process with its own gradients.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:  # prepared in the same way for both
            return
        self.model_wrapped = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        if hasattr(self.model_wrapped, "_is_accelerate_prepared"):
            del self.model_wrapped._is_accelerate_prepared

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
        if dataset.ref_logps is None:
            raise ValueError(
                f"{len(dataset)} groups have no reference log-probabilities, which the objective needs: "
                "call attach_reference_logps on the dataset before training"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of one optimizer step, and how many groups they hold over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        for position, batch in enumerate(batches):
            batch["num_groups"] = self._num_groups(position)
        groups = torch.tensor(sum(batch["num_groups"] for batch in batches), device=device)
        return batches, self.accelerator.reduce(groups, "sum")

    def _num_groups(self, position: int) -> int:
        """How many groups of this process's micro-batch at `position` in the current step count, the first ones.

        accelerate deals the batches of an epoch to the processes in turn, and fills up the last round with groups from
        the beginning; these must not count twice.
        """
        size, processes = self._train_batch_size, self.accelerator.num_processes
        total = len(self.train_dataset)  # type: ignore[arg-type]
        if self.args.dataloader_drop_last:
            return size
        rounds = -(-total // (size * processes))  # micro-batches of a process in an epoch
        steps = -(-rounds // self.args.gradient_accumulation_steps)
        dealt = (self.state.global_step % steps) * self.args.gradient_accumulation_steps + position
        start = (dealt * processes + self.accelerator.process_index) * size
        return min(max(total - start, 0), size)

    def training_step(self, model: nn.Module, inputs: dict, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Forward and backward of a batch; after the last one of a step, check that all is finite."""
        with self._speed.of(inputs):
            *others, last = self._micro_batches(inputs)
            losses = []
            for micro_batch in others:
                with self.accelerator.no_sync(model):
                    losses.append(super().training_step(model, micro_batch, num_items_in_batch))
            loss = sum(losses, super().training_step(model, last, num_items_in_batch))
        if self.accelerator.sync_gradients:
            self._check_finite(model)
            self._step.clear()
        return loss

    def _micro_batches(self, inputs: dict) -> list[dict]:
        """The micro-batches of a batch, each with how many of its groups count, the first ones."""
        counted = inputs.get("num_groups", math.inf)
        micro_batches = inputs["micro_batches"]
        if self.is_fsdp_enabled:
            # FSDP's processes gather weights together: all need as many micro-batches, the last again for nothing.
            most = max(gather_object([len(micro_batches)]))
            micro_batches += [micro_batches[-1] | {"groups": []}] * (most - len(micro_batches))
        return [part | {"num_groups": sum(group < counted for group in part["groups"])} for part in micro_batches]

    def floating_point_ops(self, inputs: dict) -> int:
        """Of a batch, as `transformers` estimates them from the number of tokens."""
        return sum(super(RPOTrainer, self).floating_point_ops(part) for part in inputs["micro_batches"])

    def _check_finite(self, model: nn.Module) -> None:
        losses = torch.cat([losses for _, losses in self._step])
        values = {"loss": losses.sum()}
        if not getattr(self.accelerator.scaler, "is_enabled", bool)():  # float16's scaler skips such steps itself
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            values["gradient norm"] = torch.nn.utils.get_total_norm(gradients)
        finite = torch.stack([value.isfinite().all() for value in values.values()]).all()
        if self.accelerator.reduce((~finite).float(), "sum") == 0:
            return
        # Every process has come here, so all can take part.
        found = gather_object([(self._suspects(), {name: float(value) for name, value in values.items()})])
        prompts = [prompt for suspects, _ in found for prompt in suspects]
        figures = next(figures for _, figures in found if not all(map(math.isfinite, figures.values())))
        raise NonFiniteError(
            f"step {self.state.global_step + 1} has "
            + " and ".join(f"{name} {value}" for name, value in figures.items())
            + ", with the prompts\n  "
            + "\n  ".join(prompts)
            + "\nThe weights are still those before this step. Try a lower --learning-rate, a longer --warmup-steps, "
            "--bf16 in place of --fp16; look at the rewards of these groups."
        )

    def _suspects(self) -> list[str]:
        """The prompts whose loss is not finite, or all of the step where the gradient alone is not."""
        of_groups = [(prompt, loss) for batch, losses in self._step for prompt, loss in zip(_prompts(batch), losses)]
        bad = [ids for ids, loss in of_groups if not loss.isfinite()] or [ids for ids, _ in of_groups]
        decode = getattr(self.processing_class, "decode", str)
        return [repr(decode(ids))[:120] for ids in bad]

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
        count = inputs.get("num_groups", len(inputs["group_sizes"]))
        losses = output.group_losses[:count]
        if num_items_in_batch is not None:
            # DDP averages gradients over processes.
            loss = losses.sum() * self.accelerator.num_processes / num_items_in_batch
        if model.training:
            self._step.append((inputs, losses.detach()))
            if self.args.logging_strategy != "no":
                self._tables.append(GroupTable.of(output, inputs).take(slice(count)))
        return (loss, output) if return_outputs else loss

    def compute_loss_context_manager(self) -> Any:
        """Mixed precision around the whole loss: accelerate wraps the model's forward, not what follows it."""
        return self.accelerator.autocast()

    def prediction_step(
        self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The batch's figures per group, for Trainer to gather over batches and processes."""
        inputs = self._prepare_inputs(inputs)
        tables, groups = [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            for part in self._micro_batches(inputs):
                table = GroupTable.of(preference_loss(model, part, self.objective, self.loss_layer), part)
                tables.append(table.take(slice(part["num_groups"])))
                groups += part["groups"]
        table = GroupTable.join(tables).take(torch.tensor(groups).argsort()).to(self.args.device)
        return None, tuple(table), table.present

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, folder: str) -> None:
        if self._aside is None:  # else it is pushed from its place
            super()._push_from_checkpoint(folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside and rename it, so that an interruption leaves all of it or nothing."""
        output = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._aside = output / checkpoints.ASIDE
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(self._aside / name, output / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(self._aside, ignore_errors=True)
            reason = str(error).splitlines()[0]
            raise RunError(f"cannot write {output / name}; checkpoints before it are intact. {reason}") from error
        finally:
            self._aside = None
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output / name))
        if self.args.should_save:
            rotate_checkpoints(str(output), self.args.save_total_limit, self.state.best_model_checkpoint)

    def _publish(self, folder: Path, place: Path) -> None:
        if self.state.best_model_checkpoint == str(folder):
            self.state.best_model_checkpoint = str(place)
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        checkpoints.seal(folder, self.identity)
        checkpoints.publish(folder, place)

    def save_whole(self) -> None:
        """Save the model and tokenizer to `output_dir` by way of a folder aside.

        Raises:
            RunError: if they cannot be written.
        """
        output = Path(str(self.args.output_dir))
        aside = output / checkpoints.ASIDE / "model"
        try:
            self.save_model(str(aside), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                for file in sorted(aside.iterdir()):
                    os.replace(file, output / file.name)
                shutil.rmtree(aside.parent)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise RunError(f"cannot write the model to {output}: {str(error).splitlines()[0]}") from error
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the summary of the groups trained on since the last log."""
        if "loss" in logs:
            # Every process logs at the same step, so all take part in gathering.
            tables = gather_object([GroupTable.join(self._tables)] if self._tables else [])
            self._tables.clear()
            if tables:
                logs = {**GroupTable.join(tables).summary(), **self._speed.summary(self.accelerator), **logs}
        super().log(logs, start_time)


def _prompts(batch: dict) -> list[list[int]]:
    """Token ids of each group's prompt."""
    firsts = torch.tensor([0, *batch["group_sizes"]]).cumsum(0).tolist()
    if "cu_seqlens" not in batch:
        prompts = (batch["labels"] == IGNORE_INDEX) & (batch["attention_mask"] == 1)
        return [batch["input_ids"][row][prompts[row]].tolist() for row in firsts[:-1]]
    ids, cu_seqlens = batch["input_ids"][0].tolist(), batch["cu_seqlens"].tolist()
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    rows = batch["label_rows"].tolist()
    # The prompt's last token predicts the first label of its responses.
    lasts = [min(rows[cu_seqlens[a] : cu_seqlens[b]], default=start) for a, b, start in zip(firsts, firsts[1:], starts)]
    return [ids[start : last + 1] for start, last in zip(starts, lasts)]


def _evaluation_summary(prediction: EvalPrediction) -> dict[str, float]:
    return GroupTable(*(torch.as_tensor(column) for column in prediction.predictions)).summary()
