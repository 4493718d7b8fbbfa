"""The runner behind `make gpu`, without a GPU."""

import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
from gpu import STEPS, Step, archive, run

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


@pytest.mark.parametrize("part", ["probe", "tune"])
def test_parts_run_on_small_sizes(part, tmp_path):
    """The same code that measures on a GPU, to its end, and its results in the archive."""
    folder = tmp_path / "device"
    script = Path(__file__).parent.parent / "bench" / "gpu_parts.py"
    small = Step(part, 120, [str(script), part, "--device", "cpu", "--small", "--out", str(folder)])
    assert run(small, 120, folder) == 0
    found = json.loads((folder / f"{part}.json").read_text())
    assert found["float32_results"] and found["heads"] if part == "probe" else len(found["shapes"]) == 2
    with tarfile.open(archive(folder)) as file:
        assert {f"device/{part}.json", "device/log.txt"} <= set(file.getnames())


def test_predictions_name_five_models_and_four_row_counts():
    import predictions

    lines = [line for line in predictions.table().splitlines() if line.startswith("| ") and "model" not in line]
    assert len(lines) == len(predictions.MODELS) * len(predictions.ROWS) == 20
    committed = (Path(__file__).parent.parent / "bench" / "notes" / "predictions-h200.md").read_text()
    assert predictions.table() == committed
