"""Run by test_trl_zero3.py with torchrun: TRL's fused head under DeepSpeed's ZeRO-3, patched and not; prints how far
apart they are.

The head's weight is partitioned over the processes, so it is whole only while TRL gathers it. In one step, one process
has no label at all.
"""

import contextlib
import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import trl.trainer.utils as utils
from transformers.integrations import HfDeepSpeedConfig

from rpo_kernels.integrations.trl import patch
from trl_trainers import model

RANK = int(os.environ["RANK"])
CONFIG = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "train_micro_batch_size_per_gpu": 2,
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def train(kind: str, patched: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and weights of three steps."""
    policy = model(kind)
    utils.add_fused_lm_head(policy, outputs=("log_probs", "entropy"))
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=torch.optim.SGD(policy.parameters(), lr=0.5), config=dict(CONFIG)
    )
    generator, losses = torch.Generator().manual_seed(RANK), []
    for step in range(3):
        input_ids = torch.randint(3, 250, (2, 8), generator=generator)
        labels = input_ids.masked_fill(torch.arange(8) < 3, -100)
        if RANK == 1 and step == 1:
            labels[:] = -100
        with patch() if patched else contextlib.nullcontext():
            assert kind == "tied" or policy.get_output_embeddings().weight.numel() == 0
            output = engine(input_ids=input_ids, labels=labels, fused_lm_head=True)
            loss = 0.01 * output.entropy.sum() - 0.1 * output.log_probs.sum()
            engine.backward(loss)
            engine.step()
        losses.append(loss.detach())
    with deepspeed.zero.GatheredParameters(list(policy.parameters())):
        return torch.stack(losses), torch.cat([p.detach().flatten().clone() for p in policy.parameters()])


keep_alive = HfDeepSpeedConfig(CONFIG)  # tells transformers, and by it TRL, that ZeRO-3 is on
for kind in ("untied", "tied", "softcap"):
    expected, mine = train(kind, patched=False), train(kind, patched=True)
    apart = [float((a - b).abs().max()) for a, b in zip(expected, mine)]
    if RANK == 0:
        print(f"APART {kind} {apart[0]} {apart[1]}", flush=True)
torch.distributed.barrier()
sys.stdout.flush()
os._exit(0)  # DeepSpeed's own exit may wait for ever on the CPU
