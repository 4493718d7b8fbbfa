"""The runner behind `make gpu`, without a GPU."""

import importlib
import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import gpu
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
    assert gpu.TOTAL_SECONDS + gpu.GRACE_SECONDS < 600


def test_a_step_goes_on_after_a_lost_device_and_stops_in_time(tmp_path, capfd):
    counter = tmp_path / "counter"
    lost_twice = f"p = open({str(counter)!r}, 'a'); p.write('x'); exit(3 if p.tell() < 3 else 0)"
    assert run(Step("lost", 60, ["-c", lost_twice, "bench"]), 60, tmp_path) == 0
    assert counter.read_text() == "xxx"
    assert run(Step("slow", 1, ["-c", "print('began', flush=True); import time; time.sleep(60)"]), 1, tmp_path) == 124
    assert "slow: exit status 124\nbegan" in (tmp_path / "log.txt").read_text()


def test_a_step_out_of_time_is_interrupted_then_killed(tmp_path, monkeypatch):
    patient = "import time\ntry: print('began', flush=True); time.sleep(60)\nfinally: print('saved')"
    assert run(Step("patient", 1, ["-c", patient]), 1, tmp_path) == 124
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    assert run(Step("deaf", 1, ["-c", deaf]), 1, tmp_path) == 124
    log = (tmp_path / "log.txt").read_text()
    assert "patient: exit status 124\nbegan" in log and "saved" in log and "deaf: exit status 124\non" in log


def test_an_interrupted_part_keeps_what_it_found(tmp_path, monkeypatch):
    def interrupted(args, found):
        found["first"] = 1.0
        raise KeyboardInterrupt

    gpu_parts = importlib.import_module("gpu_parts")
    monkeypatch.setitem(gpu_parts.PARTS, "tune", interrupted)
    monkeypatch.setattr(sys, "argv", ["gpu_parts.py", "tune", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu_parts.main()
    assert json.loads((tmp_path / "tune.json").read_text()) == {"first": 1.0}


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch, capsys):
    """A run whose second step failed, or was killed, continued: its first step is left out."""
    count = "open('{}', 'a').write('x'); import os; exit(not os.path.exists('{}'))"
    steps = [Step(name, 30, ["-c", count.format(name, file)]) for name, file in (("one", "one"), ("two", "go"))]
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "describe_machine", lambda device: {"device": "some", "torch": "2"})
    monkeypatch.setattr(gpu, "device_slug", lambda machine: "some")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    assert gpu.main() == 1 and "not finished: two" in capsys.readouterr().out
    (tmp_path / "go").touch()
    assert gpu.main() == 0
    assert [(tmp_path / name).read_text() for name in ("one", "two")] == ["x", "xx"]
    assert (tmp_path / "bench/results/some.tar.gz").exists()


@pytest.mark.parametrize("part", ["probe", "tune", "evaluate"])
def test_parts_run_on_small_sizes(part, tmp_path):
    """The same code that measures on a GPU, to its end, and its results in the archive."""
    folder = tmp_path / "device"
    script = Path(__file__).parent.parent / "bench" / "gpu_parts.py"
    small = Step(part, 120, [str(script), part, "--device", "cpu", "--small", "--out", str(folder)])
    assert run(small, 120, folder) == 0
    found = json.loads((folder / f"{part}.json").read_text())
    assert {len(group) for group in found.values()} <= {1, 2, 3, 6} and all(found.values())
    with tarfile.open(archive(folder)) as file:
        assert {f"device/{part}.json", "device/log.txt"} <= set(file.getnames())


def test_predictions_name_five_models_and_four_row_counts():
    import predictions

    table = predictions.table()
    lines = [line for line in table.splitlines() if line.startswith("| ") and "model" not in line]
    assert len(lines) == len(predictions.MODELS) * len(predictions.ROWS) == 20
    committed = (Path(__file__).parent.parent / "bench" / "notes" / "predictions-h200.md").read_text()
    assert table == committed, "python bench/predictions.py --out bench/notes/predictions-h200.md"


def test_tests_that_steps_name_exist():
    root = Path(__file__).parent.parent
    named = [word for step in STEPS for word in step.arguments if word.startswith("tests")]
    assert len(named) > 5 and all((root / word).exists() for word in named)
