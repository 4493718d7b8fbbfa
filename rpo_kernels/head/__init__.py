"""The LM head: log-probabilities from hidden states without materialising the logits."""

from .operator import linear_token_logprobs
from .plan import MemoryPlan, memory_plan

__all__ = ["MemoryPlan", "linear_token_logprobs", "memory_plan"]
