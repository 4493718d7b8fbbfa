"""Metrics of a run's batches: collected per group, so that sums over batches and processes are exact."""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .. import RPOOutput
from ..objectives import ranking_metrics
from .collator import IGNORE_INDEX

METRIC_NAMES = ("loss", "accuracy", "margin", "logp_best", "logp_worst", "drift", "scored_tokens", "truncated_tokens")


class GroupTable(NamedTuple):
    """Figures of G groups with at most K responses; an entry is a response's where `present` is 1."""

    losses: Tensor  # [G]
    implicit_rewards: Tensor  # [G, K]
    rewards: Tensor  # [G, K]
    logps: Tensor  # [G, K]
    scored_tokens: Tensor  # [G, K]
    present: Tensor  # [G, K]
    truncated_tokens: Tensor  # [G]

    @classmethod
    def of(cls, output: RPOOutput, batch: dict) -> "GroupTable":
        """Table of one batch of `GroupCollator` or `SharedPromptCollator` and its loss."""
        sizes = batch["group_sizes"]

        def by_group(values: Tensor) -> Tensor:
            return pad_sequence(values.detach().split(sizes), batch_first=True)

        if "cu_seqlens" in batch:
            scored = batch["cu_seqlens"].diff()
        else:
            scored = (batch["labels"][:, 1:] != IGNORE_INDEX).sum(-1)
        truncated = torch.tensor(batch["truncated_tokens"], device=scored.device)
        return cls(
            output.group_losses.detach(),
            by_group(output.implicit_rewards),
            by_group(batch["rewards"]),
            by_group(output.logps),
            by_group(scored),
            by_group(torch.ones_like(scored)),
            truncated,
        )

    def take(self, groups: slice | Tensor) -> "GroupTable":
        """Some of the groups, or all in another order."""
        return GroupTable(*(column[groups] for column in self))

    @classmethod
    def join(cls, tables: Sequence["GroupTable"]) -> "GroupTable":
        """The groups of several tables in one, on the CPU."""
        width = max(table.present.shape[1] for table in tables)

        def joined(columns: tuple[Tensor, ...]) -> Tensor:
            if columns[0].ndim == 1:
                return torch.cat([c.cpu() for c in columns])
            return torch.cat([torch.nn.functional.pad(c.cpu(), (0, width - c.shape[1])) for c in columns])

        return cls(*(joined(columns) for columns in zip(*tables, strict=True)))

    def to(self, device: torch.device) -> "GroupTable":
        """The table on a device."""
        return GroupTable(*(column.to(device) for column in self))

    def summary(self) -> dict[str, float]:
        """Loss, accuracy and margin (`objectives.ranking_metrics`), mean log-probability of the best and of the
        worst response by reward (in nats, over the whole response), drift (mean absolute implicit reward: how far the
        policy is from its reference), tokens scored and cut off.
        """
        present = self.present == 1
        accuracy, margin = ranking_metrics(self.implicit_rewards, self.rewards, present)
        best = self.rewards.masked_fill(~present, -torch.inf).argmax(-1, keepdim=True)
        worst = self.rewards.masked_fill(~present, torch.inf).argmin(-1, keepdim=True)
        values = {
            "loss": self.losses.mean().item(),
            "accuracy": accuracy.item(),
            "margin": margin.item(),
            "logp_best": self.logps.gather(-1, best).mean().item(),
            "logp_worst": self.logps.gather(-1, worst).mean().item(),
            "drift": self.implicit_rewards[present].abs().mean().item(),
            "scored_tokens": int(self.scored_tokens[present].sum()),
            "truncated_tokens": int(self.truncated_tokens.sum()),
        }
        return {name: values[name] for name in METRIC_NAMES}


class Speed:
    """Tokens and time of training since the last summary."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4)

    @contextlib.contextmanager
    def of(self, batch: dict) -> Iterator[None]:
        """Count a batch of `BatchForm` and the time spent inside."""
        start = time.perf_counter()
        yield
        seconds = time.perf_counter() - start
        self._sums += torch.tensor([seconds, *(batch[f"{kind}_tokens"] for kind in ("real", "computed", "padded"))])

    def summary(self, accelerator: Accelerator) -> dict[str, float]:
        """Over all processes: `tokens_per_second`, those that are not padding, and `tokens_saved`, the share of the
        tokens of separate padded sequences that were not computed."""
        sums, self._sums = self._sums, torch.zeros(4)
        seconds, real, computed, padded = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
        per_second = real * accelerator.num_processes / max(seconds, 1e-9)
        return {"tokens_per_second": per_second, "tokens_saved": 1 - computed / max(padded, 1)}
