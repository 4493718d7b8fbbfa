"""Sequence and group level of the RPO family in one launch."""

from .operator import rpo_reduce

__all__ = ["rpo_reduce"]
