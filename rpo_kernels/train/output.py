"""The output directory of a run: held by one run at a time, which starts anew, resumes, or is refused."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .._files import write_whole
from . import checkpoints
from .errors import RunError
from .identity import EXTENDABLE, differences
from .settings import RunArguments

IDENTITY, METRICS = "run.json", "metrics.json"


class OutputDirectory:
    """`with OutputDirectory(path):` holds it for one run.

    Raises:
        RunError: on entering, if it cannot be written to or another run holds it.
    """

    def __init__(self, path: Path, is_main: bool):
        self.path = path
        self.is_main = is_main
        self._lock = FileLock(path / ".lock")

    def __enter__(self) -> "OutputDirectory":
        if self.is_main:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.acquire(timeout=0)
            except Timeout as error:
                raise RunError(
                    f"another run is writing to {self.path}: wait for it, or choose another --output-dir"
                ) from error
            except OSError as error:
                raise RunError(f"cannot write to --output-dir {self.path}: {error}") from error
        return self

    def __exit__(self, *error: object) -> None:
        if self.is_main:
            self._lock.release()

    def check_unused(self, run: RunArguments) -> None:
        """RunError if it holds an earlier run that would be lost."""
        if run.resume or run.overwrite or not self._holds_a_run():
            return
        if self.is_finished():
            raise RunError(
                f"{self.path} holds a finished run: choose another --output-dir, or remove it with --overwrite"
            )
        if checkpoints.by_step(self.path):
            raise RunError(
                f"{self.path} holds checkpoints of an earlier run: continue it with --resume, remove it with "
                "--overwrite, or choose another --output-dir"
            )
        if not (self.path / IDENTITY).exists():
            raise RunError(f"{self.path} holds a model that is not of this trainer: choose another --output-dir")

    def is_finished(self) -> bool:
        """Whether a run has finished here."""
        return bool(self.metrics().get("finished"))

    def metrics(self) -> dict:
        """What metrics.json holds."""
        return _read(self.path / METRICS)

    def clear(self) -> None:
        """Remove an earlier run: what this trainer writes, and nothing else."""
        for folder in [*checkpoints.by_step(self.path), self.path / checkpoints.ASIDE]:
            shutil.rmtree(folder, ignore_errors=True)
        for pattern in (METRICS, IDENTITY, "curves.png", "*.safetensors", "*.safetensors.index.json"):
            for path in self.path.glob(pattern):
                path.unlink()

    def begin(self, run: RunArguments, identity: Mapping[str, Any], given: str | None) -> Path | None:
        """The checkpoint to go on from, None to start from the beginning.

        Args:
            run: whether and how to resume.
            identity: this run's, see `run_identity`.
            given: the checkpoint that `--resume-from-checkpoint` names.

        Raises:
            RunError: if the run was begun with other settings or its checkpoints cannot be used.
        """
        checkpoint = Path(given) if given else None
        passed_over: list[str] = []
        if run.resume and not given:
            checkpoint, passed_over = checkpoints.newest_complete(self.path)
        if checkpoint is not None:
            self._check_same(run, checkpoints.identity_of(checkpoint), identity, checkpoint)
        if self.is_main:
            for line in passed_over:
                print(f"passed over {line}", flush=True)
            if checkpoint is not None:
                print(f"resuming from {checkpoint}", flush=True)
            elif run.resume:
                print(f"{self.path} holds no checkpoint (--save-steps): starting from the beginning", flush=True)
            if checkpoint is None:
                self.clear()
            shutil.rmtree(self.path / checkpoints.ASIDE, ignore_errors=True)
            write_whole(self.path / IDENTITY, json.dumps(identity, indent=1) + "\n")
        return checkpoint

    def check_finished(self, run: RunArguments, identity: Mapping[str, Any]) -> None:
        """RunError if a finished run is to be resumed with other settings."""
        self._check_same(run, _read(self.path / IDENTITY), identity, self.path)

    def _check_same(self, run: RunArguments, then: Mapping[str, Any], now: Mapping[str, Any], place: Path) -> None:
        changed = differences(then, now)
        if run.extend:
            changed = {name: words for name, words in changed.items() if name not in EXTENDABLE}
        if not changed:
            return
        lines = "\n  ".join(f"{name}: {words}" for name, words in changed.items())
        hint = "; --extend takes other steps and epochs" if set(changed) <= set(EXTENDABLE) else ""
        raise RunError(f"{place} was begun with other settings, and is resumed only with the same{hint}\n  {lines}")

    def _holds_a_run(self) -> bool:
        patterns = (IDENTITY, METRICS, "checkpoint-*", "*.safetensors", "pytorch_model*.bin", "*.gguf")
        return any(next(self.path.glob(pattern), None) for pattern in patterns)


def _read(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
