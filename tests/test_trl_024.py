"""The older generation of TRL, which LLaMA-Factory and ms-swift pin: the tests of `patch` in an environment of its own.

The environment is made on first use beside the checkout's own, in `.venv-trl-0.24`, with the transformers that TRL 0.24
needs. RPO_KERNELS_TRL_0_24 names another interpreter that has them.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
ENVIRONMENT = ROOT / ".venv-trl-0.24"
PACKAGES = ["trl==0.24.0", "transformers==4.57.6", "peft", "pytest", "pytest-timeout", "numpy", "hypothesis", "rich"]


@pytest.fixture(scope="module")
def interpreter() -> str:
    """A Python with TRL 0.24; skips where its packages cannot be had."""
    if "RPO_KERNELS_TRL_0_24" in os.environ:
        return os.environ["RPO_KERNELS_TRL_0_24"]
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "complete").exists():
        venv.create(ENVIRONMENT, clear=True, with_pip=True)
        for packages in (["torch==2.13.0"], PACKAGES):  # torch alone and first: it decides which build comes
            install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
            done = subprocess.run(install, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"cannot install {packages}: {done.stderr.strip()[-300:]}")
        (ENVIRONMENT / "complete").touch()
    return str(python)


def test_trl_0_24(interpreter):
    """Handle, functions and all trainers; only what needs the fused LM head is skipped there."""
    tests = [str(ROOT / "tests" / "test_trl_patch.py")]
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    version = [interpreter, "-c", "import trl; print(trl.__version__)"]
    assert subprocess.run(version, capture_output=True, text=True).stdout.startswith("0.24"), sys.executable
    assert " passed" in done.stdout
