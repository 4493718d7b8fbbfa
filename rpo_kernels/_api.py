"""The public names, each listed once. Importing this file, which the first use of one of them does, imports torch."""

from .head import linear_token_logprobs
from .head.plan import MemoryPlan, memory_plan
from .integrations.model_head import ModelHead, find_head
from .kernels.dispatch import backend_info
from .logprobs import token_logprobs
from .losses import linear_rpo_loss, rpo_loss
from .objectives import CDPO, DPO, IPO, RPO, DistilledDPO, SimPO
from .outputs import TokenOutputs
from .preference import RPOOutput, preference_loss, score_loss

__all__ = [
    "CDPO",
    "DPO",
    "IPO",
    "RPO",
    "DistilledDPO",
    "MemoryPlan",
    "ModelHead",
    "RPOOutput",
    "SimPO",
    "TokenOutputs",
    "backend_info",
    "find_head",
    "linear_rpo_loss",
    "linear_token_logprobs",
    "memory_plan",
    "preference_loss",
    "rpo_loss",
    "score_loss",
    "token_logprobs",
]
