"""`rpo-kernels train`: prints its first line at once, then imports the libraries of training."""

import os
import sys
from collections.abc import Sequence

from .._interruption import exits_at_once
from .settings import help_text


def main(argv: Sequence[str]) -> int:
    """Show the help, or train. Returns the exit status."""
    if any(word in ("-h", "--help") for word in argv):
        print(help_text())
        return 0
    if os.environ.get("RANK", "0") == "0" and "--help-all" not in argv:
        print("rpo-kernels train: loading torch and transformers", file=sys.stderr, flush=True)
    with exits_at_once("train", resumes=True):
        from .run import main as run

    return run(["--help" if word == "--help-all" else word for word in argv])
