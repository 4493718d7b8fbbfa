"""Atomic checkpoints: written under a temporary name with a record of every file, then renamed.

A checkpoint holds, beside what `transformers.Trainer` writes, `checkpoint.json`: the size of every file and the
identity of the run. A checkpoint cut short by an interruption or a full disk has no such record, or does not match it.
"""

import json
import os
import re
import shutil
from pathlib import Path

from .._files import write_whole
from .errors import RunError

RECORD = "checkpoint.json"
ASIDE = ".unfinished"  # folder in the output directory; its contents may be deleted at any time


def seal(folder: Path, identity: dict) -> None:
    """Write the record of a checkpoint, after all its files have reached the disk."""
    sizes = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != RECORD):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        sizes[str(path.relative_to(folder))] = path.stat().st_size
    write_whole(folder / RECORD, json.dumps({"files": sizes, "run": identity}, indent=1))


def publish(folder: Path, place: Path) -> None:
    """Move a sealed checkpoint to its place; one already there, of an earlier attempt at the same step, goes."""
    if place.exists():
        shutil.rmtree(place)
    os.replace(folder, place)


def defect(folder: Path) -> str | None:
    """Why training cannot be resumed from a checkpoint; None if it can."""
    try:
        sizes = json.loads((folder / RECORD).read_text(encoding="utf-8"))["files"].items()
    except FileNotFoundError:
        return f"it has no {RECORD}: it was not written to its end, or by another program"
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return f"its {RECORD} cannot be read"
    for name, size in sizes:
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} holds {path.stat().st_size} of {size} bytes"
    if not any(name.startswith(("optimizer", "global_step", "pytorch_model_fsdp")) for name, _ in sizes):
        return "it holds no state of the optimizer (--save-only-model)"
    return None


def identity_of(folder: Path) -> dict:
    """The identity of the run that a checkpoint without defect belongs to."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))["run"]


def by_step(output: Path) -> list[Path]:
    """The checkpoints in an output directory, newest first."""
    found = [path for path in output.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))


def newest_complete(output: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint without defect, if any, and why each newer one was passed over.

    Raises:
        RunError: if there are checkpoints and none is complete.
    """
    passed_over: list[str] = []
    for folder in by_step(output):
        reason = defect(folder)
        if reason is None:
            return folder, passed_over
        passed_over.append(f"{folder.name}: {reason}")
    if passed_over:
        lines = "\n  ".join(passed_over)
        raise RunError(f"{output} holds no complete checkpoint; start from the beginning with --overwrite\n  {lines}")
    return None, passed_over
