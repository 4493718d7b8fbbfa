"""`python -m rpo_kernels.integrations.trl trl.scripts.dpo [its arguments]`: one of TRL's scripts, patched."""

from .._patching import run_patched
from .patching import patch

run_patched(patch, "rpo_kernels.integrations.trl")
