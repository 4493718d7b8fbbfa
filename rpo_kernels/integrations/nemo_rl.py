"""NeMo-RL: `RPOLossFn`, a loss for its preference trainer, and the rewards in its batches.

In a copy of NeMo-RL's `examples/run_dpo.py`, with two lines before `main()` and one in it:

    from rpo_kernels.integrations.nemo_rl import RPOLossFn, carry_rewards
    carry_rewards()                                      # completions of the data then have a "reward"
    ...
    loss_fn = RPOLossFn(RPO("bwd_kl", beta=0.1))         # after setup(), in place of the one that it returns
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..objectives import RPO, Objective
from ..preference import preference_loss
from ._patching import Patch, Replacement

try:
    from nemo_rl.algorithms.loss.interfaces import LossInputType, LossType
except ImportError as error:
    raise ImportError("rpo_kernels.integrations.nemo_rl needs NeMo-RL, https://github.com/NVIDIA-NeMo/RL") from error

REWARD = "reward"  # of a completion in the data; "rewards" in a batch


class RPOLossFn:
    """A preference loss for `dpo_train`, with any objective of this package (NeMo-RL issue 193).

    A batch is NeMo-RL's: responses interleaved (chosen, rejected, chosen, ...), `token_mask` `[B, S]`,
    `reference_policy_logprobs` `[B, S]` rolled to the left, `sample_mask` `[B]`; and `rewards` `[B]`. Without these,
    objectives that only use which response is best (DPO, IPO, SimPO) take the first of each group as such. The result
    is summed over the valid groups and divided by `global_valid_seqs / num_responses`, as NeMo-RL's own losses are.

    Args:
        objective: `RPO(...)`, a preset or any callable that `preference_loss` takes. NeMo's `rpo_sq` is `RPO("sq")`
            without its factor 1/2.
        num_responses: K, side by side in the batch.
        sft_loss_weight: of the first responses' negative log-likelihood, summed over tokens, beside the objective.
        use_fused_linear_logprobs: as in NeMo-RL's `DPOLossFn`.
    """

    loss_type = LossType.SEQUENCE_LEVEL
    input_type = LossInputType.LOGPROB

    def __init__(
        self,
        objective: Objective = RPO(),
        num_responses: int = 2,
        sft_loss_weight: float = 0.0,
        use_fused_linear_logprobs: bool = False,
    ):
        self.objective, self.num_responses, self.sft_loss_weight = objective, num_responses, sft_loss_weight
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self,
        next_token_logprobs: Tensor,
        data: Mapping[str, Any],
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Loss and metrics of a micro-batch from `[B, S - 1]` log-probabilities of the next tokens."""
        size = self.num_responses
        scored = data["token_mask"][:, 1:].bool()
        mask = data["sample_mask"]
        reference_free = getattr(self.objective, "reference_free", False)
        rewards = self._rewards(data, mask)
        output = preference_loss(
            next_token_logprobs,
            torch.where(scored, 0, -100),
            rewards,
            ref_logps=None if reference_free else data["reference_policy_logprobs"][:, :-1],
            objective=self.objective,
            num_responses=size,
        )

        def mean(per_group: Tensor, of: Tensor) -> Tensor:
            # Masked positions may hold any value.
            return torch.where(of > 0, per_group * of, 0).sum() / (global_valid_seqs / size)

        valid = mask[::size]
        preference = mean(output.group_losses, valid)
        sft = mean(-output.logps[::size], valid) if self.sft_loss_weight else preference.new_zeros(())
        loss = preference + self.sft_loss_weight * sft
        # NeMo-RL's "rewards" are log-ratios.
        ratios = output.implicit_rewards.view(-1, size) / getattr(self.objective, "beta", 1.0)
        best, worst = (ratios.gather(1, i).squeeze(1) for i in _extremes(rewards.view(-1, size)))
        metrics = dict(
            loss=loss,
            sft_loss=sft,
            preference_loss=preference,
            accuracy=mean((best > worst).float(), valid),
            rewards_chosen_mean=mean(best, valid),
            rewards_rejected_mean=mean(worst, valid),
            num_valid_samples=mask.sum() / size,
        )
        return loss, {name: value.item() for name, value in metrics.items()}

    def _rewards(self, data: Mapping[str, Any], mask: Tensor) -> Tensor:
        if "rewards" in data:
            rewards = data["rewards"]
            if rewards.shape != mask.shape:
                raise ValueError(
                    f"rewards must have the shape of sample_mask, {list(mask.shape)}; got {list(rewards.shape)} "
                    "(NeMo-RL pads its last validation batch without them: let the batch size divide the data)"
                )
            return torch.where(mask > 0, rewards, 0)
        if getattr(self.objective, "target_margin", None) is None:
            raise ValueError("the objective needs rewards, and the batch has none: call carry_rewards() before setup()")
        return (torch.arange(len(mask), device=mask.device) % self.num_responses == 0).float()


def _extremes(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Where the best and the worst response of each group stand, `[G, 1]` each; the first and the last of equals."""
    flipped = rewards.flip(1).argmin(1, keepdim=True)
    return rewards.argmax(1, keepdim=True), rewards.shape[1] - 1 - flipped


def carry_rewards() -> Patch:
    """Let NeMo-RL's preference data keep each completion's `"reward"`: as `rewards` `[B]` in the batches.

    Replaces `preference_preprocessor` and `preference_collate_fn`. Call it before `setup_preference_data` and `setup`.

    Returns:
        A handle: `undo()`, or leaving it as a context manager, restores NeMo-RL's own functions.

    Raises:
        RuntimeError: if this version's functions have other parameters than those known here.
    """
    from nemo_rl.data import collate_fn, processors

    active = Patch.active("nemo_rl")
    if active is not None:
        return active
    preprocess, collate = processors.preference_preprocessor, collate_fn.preference_collate_fn

    @functools.wraps(preprocess)
    def preference_preprocessor(datum_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        completions = sorted(datum_dict["completions"], key=lambda completion: completion["rank"])
        missing = [completion for completion in completions if REWARD not in completion]
        if missing:
            raise ValueError(f'each completion must have a "{REWARD}", got one with {sorted(missing[0])}')
        rewards = [float(completion[REWARD]) for completion in completions]
        return {**preprocess(datum_dict, *args, **kwargs), "rewards": rewards}

    @functools.wraps(collate)
    def preference_collate_fn(data_batch: Sequence[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        batch = collate(data_batch, *args, **kwargs)
        batch["rewards"] = torch.tensor([reward for datum in data_batch for reward in datum["rewards"]])
        return batch

    of_datum = ("datum_dict", "task_data_spec", "tokenizer", "max_seq_length", "idx")
    of_batch = ("data_batch", "tokenizer", "make_sequence_length_divisible_by", "add_loss_mask")
    replacements = [
        Replacement("nemo_rl.data.processors", "preference_preprocessor", of_datum, preference_preprocessor),
        Replacement("nemo_rl.data.collate_fn", "preference_collate_fn", of_batch, preference_collate_fn),
    ]
    return Patch("nemo_rl", replacements)
