"""The public names of the trainer, each listed once; loading this file loads transformers."""

from .batches import BatchForm
from .config import RPOArguments
from .data import DataError, Group, read_groups
from .dataset import GroupCollator, PreferenceDataset
from .reference import attach_reference_logps
from .trainer import RPOTrainer

__all__ = [
    "BatchForm",
    "DataError",
    "Group",
    "GroupCollator",
    "PreferenceDataset",
    "RPOArguments",
    "RPOTrainer",
    "attach_reference_logps",
    "read_groups",
]
