"""What the arguments of both commands mean, and whether they can be met."""

import os
from pathlib import Path


def memory_limit(text: str | None, device: str) -> int | None:
    """Bytes that a measured implementation may take; None, on a GPU, for what there is."""
    import torch

    from ..head.budget import parse_budget

    if text is None and device != "cpu":
        return None
    try:
        # Without a budget the planner takes a quarter of what is free.
        return parse_budget(text, torch.device(device)) * (1 if text else 3)
    except ValueError as error:
        raise ValueError(str(error).replace("memory_budget", "--memory-limit")) from None


def check_writable(folder: Path) -> None:
    """Raise OSError, naming the option, if nothing can be written to the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"--out: cannot write to {folder}: {error.strerror or error}") from error
