"""Another commit of this repository, built in a worktree of its own, to be timed beside this checkout.

Its kernels are measured by this checkout's benchmark, which is copied over its own, so both do the same work.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
ROOT = PACKAGE.parent


@contextmanager
def checkout(revision: str) -> Iterator[tuple[str, str]]:
    """A built checkout of a revision for the time of the block: its folder and its short commit name. This checkout is
    built too.

    Raises:
        ValueError: if this package does not run from a git checkout, or the revision does not exist or does not build.
    """
    if not (ROOT / ".git").exists() or not (ROOT / "setup.py").exists():
        raise ValueError(f"--base needs a git checkout of the package, and {ROOT} is none")
    commit = _git("rev-parse", "--verify", "--quiet", "--short=7", f"{revision}^{{commit}}")
    if commit is None:
        raise ValueError(f"--base must be a commit, branch or tag of this repository; got {revision!r}")
    with tempfile.TemporaryDirectory(prefix="rpo-base-") as folder:
        tree = Path(folder) / commit
        try:
            if _git("worktree", "add", "--detach", str(tree), commit) is None:
                raise ValueError(f"git could not check out {commit}")
            for one in (tree, ROOT):  # this checkout's kernels as its sources are now
                build(one)
            benchmark = tree / PACKAGE.name / "benchmark"
            shutil.rmtree(benchmark, ignore_errors=True)
            shutil.copytree(PACKAGE / "benchmark", benchmark, ignore=shutil.ignore_patterns("__pycache__"))
            yield str(tree), commit
        finally:
            _git("worktree", "remove", "--force", str(tree))


def build(tree: Path) -> None:
    """Compile the CPU kernels in a checkout.

    Raises:
        ValueError: with the compiler's last words.
    """
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{tree.name} does not build: {done.stderr.strip()[-300:]}")


def _git(*arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
