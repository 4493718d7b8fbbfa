"""`patch` under ZeRO-3 in two processes on the CPU. Needs DeepSpeed: `DS_BUILD_OPS=0 pip install deepspeed`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent


def test_a_partitioned_head():
    pytest.importorskip("trl")
    pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}",
        "OMP_NUM_THREADS": "1",
    }
    command = [*launch, str(HERE / "zero3_processes.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    apart = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("APART")]
    assert [kind for kind, *_ in apart] == ["untied", "tied", "softcap"], done.stdout[-2000:] + done.stderr[-3000:]
    assert all(float(value) < 1e-5 for _, *values in apart for value in values), apart
