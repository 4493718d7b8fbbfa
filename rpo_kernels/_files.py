"""Files that are either complete or absent."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically, creating its folder: an interruption never leaves a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
