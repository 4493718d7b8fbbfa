"""The Triton kernels compiled ahead of time, no GPU needed: what their speed rests on, read from the machine code.

Compilation runs in a process of its own, since under TRITON_INTERPRET there is none in this one. `pytest -s` prints
the figures; `python bench/triton_code.py` prints them alone.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "bench" / "triton_code.py"
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
VOCABULARIES = (32_000, 128_256, 151_936, 262_144)


def compiled(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(SCRIPT.parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, str(SCRIPT), "--json", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_machine_code(target):
    builds = compiled("--target", target)
    for build in builds:
        print({name: value for name, value in build.items() if name != "kinds"})
    served = {(build["name"].split()[0], columns) for build in builds for columns in build["vocabularies"]}
    assert served >= {(kernel, columns) for kernel in ("row_stats", "row_grad") for columns in VOCABULARIES}
    for build in builds:
        assert build["spills"] == 0, build
        assert build.get("local_accesses", 0) == 0, build
        assert build["shared"] <= SHARED_MEMORY[target], build
        if "instructions" in build:
            check_main_loop(build)
        if build["name"].startswith("tile 8192") and target != "gfx942":
            # Also where the row ends within the block: loads of float32 and, but for marks, stores of half precision.
            assert build["wide_accesses"] >= (4 if "marks" in build["name"] else 8), build


def check_main_loop(build):
    """What the roofline needs of the loop over a row."""
    kernel, *form = build["name"].split()
    whole_vectors = not any(word.startswith("1x") for word in form)
    if whole_vectors:
        # 16 bytes at a time, or 32 where the target can.
        assert build["loads"] and all(kind.endswith((".128", ".256")) for kind in build["loads"]), build
        stores = [kind for kind in build["stores"] if "active" not in form or not kind.endswith(".U8")]
        assert (kernel == "row_grad") == bool(stores), build
        assert all(kind.endswith((".128", ".256")) for kind in stores), build
    if "active" in form:
        return  # an option whose mask's bytes go through shared memory
    # One exponential a column, and one a lane and block to move its maximum; tanh takes another.
    exponentials = 2 if "softcap" in form else 1
    assert exponentials <= build["exponentials"] <= exponentials + 0.07, build
    assert build["barriers"] == 0, build
    # 132 processors issue 128 instructions a cycle at 1.7 GHz: at 4.3 TB/s of bfloat16 that is 13 a column read once.
    limit = 8 if whole_vectors else 16
    limit += 24 if "softcap" in form else 0
    limit += 8 if {"outputs", "entropy", "mean_logit", "is_top1", "log_sum_sq_probs"} & set(form) else 0
    assert build["instructions"] < limit, build
