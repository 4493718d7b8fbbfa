"""Fused kernels for Reward-aware Preference Optimization: from logits, or hidden states and LM head, to the loss."""

from .kernels.dispatch import backend_info
from .logprobs import token_logprobs
from .losses import RPOOutput, rpo_loss
from .objectives import CDPO, DPO, IPO, RPO, DistilledDPO, SimPO

__version__ = "0.1.0"
__all__ = [
    "CDPO",
    "DPO",
    "IPO",
    "RPO",
    "DistilledDPO",
    "RPOOutput",
    "SimPO",
    "backend_info",
    "rpo_loss",
    "token_logprobs",
]
