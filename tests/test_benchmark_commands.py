"""The commands `bench` and `memory`, their files and charts, and the script that fills the README."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from rpo_kernels.benchmark.charts import draw_bench
from rpo_kernels.benchmark.gpu import STEPS, Step, run
from rpo_kernels.benchmark.reports import format_bytes, save_json
from rpo_kernels.cli import main

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import make_tables


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """Results of a small sweep at the logits level and one size of the head."""
    out = tmp_path_factory.mktemp("bench")
    common = [
        "--providers",
        "rpo_kernels in place",
        "eager",
        "--seconds",
        "0.1",
        "--out",
        str(out),
        "--dtype",
        "float32",
    ]
    sizes = ["--model", "qwen2.5-0.5b", "--vocab", "1000"]
    assert main(["bench", *sizes, *common, "--level", "logits", "frozen", "--rows", "32", "64"]) == 0
    return one(out, "bench.json")


def test_bench_writes_every_sample(bench):
    data = json.loads(bench.read_text())
    assert data["machine"]["versions"]["torch"] and data["machine"]["date"] and data["rates"]["copy"] > 0
    assert len(data["problems"]) == 4
    for entry in data["problems"]:
        results = [result for result in entry["providers"].values() if result["status"] == "ok"]
        assert results
        for result in results:
            assert len(result["forward_s"]) == len(result["backward_s"]) == len(result["evaluation_s"]) >= 3
            assert result["peak_bytes"] >= 0 and result["errors"]
    assert {p.name for p in bench.parent.iterdir()} >= {"bench-logits.png", "bench-logits.svg", "bench-head-frozen.png"}


def test_bench_resumes(bench):
    before = json.loads(bench.read_text())
    arguments = "--model qwen2.5-0.5b --vocab 1000 --dtype float32 --level logits --rows 32 128 --resume --seconds 0.1"
    common = ["--providers", "rpo_kernels in place", "--out", str(bench.parent.parent)]
    assert main(["bench", *arguments.split(), *common]) == 0
    after = json.loads(bench.read_text())
    assert after["problems"][:4] == before["problems"] and len(after["problems"]) == 5


def test_wrong_arguments(capsys):
    assert main(["bench", "--model", "gpt-9"]) == 2
    assert "gpt-9" in capsys.readouterr().out
    assert main(["memory", "--card", "lots", "--predict"]) == 2
    assert "lots" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "--responses", "1"])


def test_list(capsys):
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out
    assert "runs on cuda devices only" in listed and "eager torch" in listed


def test_memory(tmp_path, capsys):
    arguments = ["--model", "qwen2.5-0.5b", "--length", "4", "--providers", "eager", "--card", "80GB"]
    assert main(["memory", *arguments, "--predict"]) == 0
    assert "does not fit" not in capsys.readouterr().out
    assert main(["memory", *arguments, "--out", str(tmp_path)]) == 0
    data = json.loads(one(tmp_path, "memory.json").read_text())
    assert data["providers"]["eager torch"]["parts"]["work"] > 0 and data["predicted"]["rpo_kernels"]
    assert one(tmp_path, "memory.png").stat().st_size > 10_000 and one(tmp_path, "*.pickle")


def test_charts_of_failures(bench, tmp_path):
    """A provider that was out of memory, or wrong, is drawn and listed as such."""
    data = json.loads(bench.read_text())
    for entry in data["problems"]:
        for status, name in (("out of memory", "eager torch"), ("wrong", "rpo_kernels in place")):
            if name in entry["providers"]:
                entry["providers"][name] = {"status": status, "reason": "because"}
    assert "rpo_kernels in place: wrong, because" in make_tables.markdown(data)
    assert all(path.stat().st_size > 10_000 for path in draw_bench(data, tmp_path, "x"))
    assert "eager torch: out of memory" in make_tables.markdown(data)


def test_readme_tables(bench, tmp_path):
    readme = tmp_path / "README.md"
    blocks = [
        f"<!-- begin results: r.json{only} -->\nold\n<!-- end results -->\n" for only in ("", " charts", " tables")
    ]
    readme.write_text("before\n" + "between\n".join(blocks) + "after\n")
    (tmp_path / "r.json").write_text(bench.read_text())
    make_tables.fill(readme)
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| eager torch |") == 8 and text.count("(r-logits.png)") == text.count("between") == 2
    assert (tmp_path / "r-logits.png").exists()
    make_tables.fill(readme)
    assert readme.read_text() == text


def test_the_readme_is_made_from_the_committed_results(tmp_path):
    root = Path(make_tables.__file__).parents[1]
    shutil.copytree(root / "bench" / "results", tmp_path / "bench" / "results")
    shutil.copy(root / "README.md", tmp_path)
    make_tables.fill(tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == (root / "README.md").read_text()


def test_gpu_steps_are_commands_that_parse():
    from rpo_kernels.benchmark import bench as module

    for step in STEPS:
        if "bench" in step.arguments:
            module.problems_of(module.parse([*step.arguments[3:], "--device", "cuda"]))
    assert len({step.name for step in STEPS}) == len(STEPS)


def test_gpu_step_goes_on_after_a_lost_device_and_stops_in_time(tmp_path, capfd):
    counter = tmp_path / "counter"
    lost_twice = f"p = open({str(counter)!r}, 'a'); p.write('x'); exit(3 if p.tell() < 3 else 0)"
    assert run(Step("lost", 60, ["-c", lost_twice, "bench"]), 60, tmp_path) == 0
    assert counter.read_text() == "xxx"
    assert run(Step("slow", 1, ["-c", "print('began', flush=True); import time; time.sleep(60)"]), 1, tmp_path) == 124
    assert "slow: exit status 124\nbegan" in (tmp_path / "log.txt").read_text()


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a" / "b.json"
    save_json({"x": 1}, path)
    with pytest.raises(TypeError):
        save_json({"x": object()}, path)
    assert json.loads(path.read_text()) == {"x": 1}
    assert [format_bytes(x) for x in (0, 999, 1000, 123456, 999.9e6, 2e12)] == [
        "0 B", "999 B", "1 kB", "123 kB", "1 GB", "2 TB",
    ]  # fmt: skip
