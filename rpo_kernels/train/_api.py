"""The public names of the trainer, each listed once; loading this file loads transformers."""

from .batches import BatchForm
from .collator import GroupCollator
from .config import RPOArguments
from .data import DataError, Group, read_groups
from .dataset import PreferenceDataset
from .errors import NonFiniteError, RunError
from .reference import attach_reference_logps
from .trainer import RPOTrainer

__all__ = [
    "BatchForm",
    "DataError",
    "Group",
    "GroupCollator",
    "NonFiniteError",
    "PreferenceDataset",
    "RPOArguments",
    "RPOTrainer",
    "RunError",
    "attach_reference_logps",
    "read_groups",
]
