"""The runner behind `make gpu`, without a GPU."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from gpu import STEPS, Step, run

from rpo_kernels.benchmark import bench, memory


def test_steps_are_commands_that_parse():
    for step in STEPS:
        if "bench" in step.arguments:
            args = bench.parse([*step.arguments[3:], "--device", "cuda"])
            args.case = args.case or ["logits", "head", "head-frozen"]
            assert bench.problems_of(args, None)
        elif "memory" in step.arguments:
            assert memory.parse(step.arguments[3:])
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_a_step_goes_on_after_a_lost_device_and_stops_in_time(tmp_path, capfd):
    counter = tmp_path / "counter"
    lost_twice = f"p = open({str(counter)!r}, 'a'); p.write('x'); exit(3 if p.tell() < 3 else 0)"
    assert run(Step("lost", 60, ["-c", lost_twice, "bench"]), 60, tmp_path) == 0
    assert counter.read_text() == "xxx"
    assert run(Step("slow", 1, ["-c", "print('began', flush=True); import time; time.sleep(60)"]), 1, tmp_path) == 124
    assert "slow: exit status 124\nbegan" in (tmp_path / "log.txt").read_text()
