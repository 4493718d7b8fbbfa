"""The commands `bench` and `memory`, their files, tables and charts, and the script that fills the docs."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from rpo_kernels.benchmark import machine as machines
from rpo_kernels.benchmark.charts import draw
from rpo_kernels.benchmark.results import load_json, save_json
from rpo_kernels.benchmark.tables import format_bytes, markdown, print_tables, tables_of
from rpo_kernels.cli import main

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import make_docs

SIZES = ["--model", "qwen2.5-0.5b", "--vocab", "1000", "--dtype", "float32", "--seconds", "0.1"]


def one(folder: Path, pattern: str) -> Path:
    (path,) = folder.rglob(pattern)
    return path


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Path:
    """Results of a small sweep at the logits level, the row kernels and one case of the head."""
    out = tmp_path_factory.mktemp("bench")
    arguments = [*SIZES, "--only", "rpo_kernels in place", "eager", "native in place", "--out", str(out)]
    cases = ["--case", "logits", "head-frozen", "rows"]
    assert main(["bench", *arguments, *cases, "--rows", "32", "64", "--time-only"]) == 0
    # Memory takes a process for each implementation, so of one case only.
    assert main(["bench", *arguments, "--case", "logits", "--rows", "32", "64", "--resume"]) == 0
    return one(out, "bench.json")


def test_bench_writes_every_sample(bench):
    data = load_json(bench)
    assert data["machine"]["versions"]["torch"] and data["machine"]["units"] in bench.parent.name
    assert len(data["problems"]) == 6
    for entry in data["problems"]:
        results = [result for result in entry["results"].values() if result["status"] == "ok"]
        names = set(entry["references"])
        assert (
            results
            and names
            == {"logits": {"copy"}, "head-frozen": {"gemm"}, "rows": {"read", "copy"}}[entry["problem"]["case"]]
        )
        for result in results:
            assert len(result["step_s"]) == len(result["forward_s"]) >= 3 and "attempts" not in result
            assert {name: len(samples) for name, samples in result["reference_s"].items()} == dict.fromkeys(
                names, len(result["step_s"])
            )
            assert result["errors"] and ("peak_bytes" in result) == (entry["problem"]["case"] == "logits")
    charts = {path.name for path in bench.parent.iterdir()}
    assert charts >= {"bench-logits.png", "bench-logits.svg", "bench-head-frozen.png", "bench-rows.png"}


def run_again(bench: Path, *arguments: str) -> int:
    return main(["bench", *SIZES, "--case", "logits", "--out", str(bench.parent.parent), "--resume", *arguments])


def test_resume_measures_what_is_missing(bench, tmp_path, monkeypatch):
    """New sizes, new implementations, and what was interrupted; what is there stays."""
    copied = shutil.copytree(bench.parent.parent, tmp_path / "out") / bench.parent.name / "bench.json"
    before = json.loads(copied.read_text())
    measured = []
    from rpo_kernels.benchmark import measure

    def recorded(one, problems, settings):
        measured.append((one.name, [p.rows for p in problems]))
        return [{"status": "ok", "reason": None, "peak_bytes": 0, "input_bytes": {}} for _ in problems]

    monkeypatch.setattr(measure, "measure_peaks", recorded)
    assert run_again(copied, "--only", "rpo_kernels in place", "--rows", "32", "128") == 0
    after = json.loads(copied.read_text())
    assert measured == [("rpo_kernels in place", [128])]
    assert after["problems"][:6] == before["problems"] and len(after["problems"]) == 7
    measured.clear()
    assert run_again(copied, "--only", "torch backend", "--rows", "32") == 0
    assert measured == [("rpo_kernels torch backend", [32])]
    data = json.loads(copied.read_text())
    assert data["problems"][0]["results"]["rpo_kernels torch backend"]["step_s"]
    interrupted = {"status": "interrupted", "reason": "x", "attempts": 1}
    data["problems"][0]["results"]["eager torch"] = interrupted
    data["problems"][1]["results"]["eager torch"] = {**interrupted, "attempts": 2}
    save_json(data, copied)
    measured.clear()
    assert run_again(copied, "--only", "eager", "--rows", "32", "64") == 0
    assert measured == [("eager torch", [32])]
    statuses = [e["results"]["eager torch"]["status"] for e in json.loads(copied.read_text())["problems"][:2]]
    assert statuses == ["ok", "interrupted"]


def test_interrupting_leaves_nothing_half_done(tmp_path, monkeypatch):
    from rpo_kernels.benchmark import measure

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure_peaks", interrupted)
    assert main(["bench", *SIZES, "--case", "logits", "--only", "eager", "--rows", "32", "--out", str(tmp_path)]) == 130
    assert load_json(one(tmp_path, "bench.json"))["problems"][0]["results"] == {}


def test_what_is_terminated_keeps_its_samples(tmp_path):
    """For a minute it would sample; it is stopped when it has begun to."""
    code = """
import os, signal
from rpo_kernels.benchmark import sampling
from rpo_kernels.cli import main
taken, take = [], sampling.Sampler.__call__
def counted(self):
    taken.append(1)
    if len(taken) == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    return take(self)
sampling.Sampler.__call__, sampling.MOST = counted, 10**6
raise SystemExit(main(ARGV))
"""
    argv = [
        "bench",
        *SIZES,
        "--case",
        "logits",
        "--only",
        "eager",
        "--rows",
        "8",
        "--time-only",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([sys.executable, "-c", code.replace("ARGV", repr([*argv, "--seconds", "60"]))])
    assert done.returncode == 130
    result = load_json(one(tmp_path, "bench.json"))["problems"][0]["results"]["eager torch"]
    assert result["status"] == "ok" and len(result["step_s"]) == 4


def test_resume_refuses_what_does_not_belong_together(bench, tmp_path, capsys):
    copied = shutil.copytree(bench.parent.parent, tmp_path / "out") / bench.parent.name / "bench.json"
    whole = copied.read_text()
    copied.write_text(whole[: len(whole) // 2])
    assert run_again(copied) == 2
    assert "not a whole JSON file" in capsys.readouterr().out
    data = json.loads(whole)
    data["machine"]["versions"]["torch"] = "1.0"
    save_json(data, copied)
    assert run_again(copied) == 2
    assert "the setup differs: versions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("bench --model gpt-9", "gpt-9"),
        ("bench --only no-such-thing", "no-such-thing"),
        ("bench --memory-limit lots", "--memory-limit must be"),
        ("bench --device cuda", "--device cuda"),
        ("bench --data /nope.jsonl --model x", "/nope.jsonl"),
        ("bench --base no-such-revision", "no-such-revision"),
        ("memory --card lots --predict", "--card must be"),
        ("memory --model gpt-9", "gpt-9"),
    ],
)
def test_wrong_arguments_are_named(arguments, named, capsys, tmp_path):
    if named == "--device cuda" and command_sees_a_gpu():
        pytest.skip("there is a GPU")
    argv = arguments.split()
    assert main([*argv, "--out", str(tmp_path)]) == 2
    assert named in capsys.readouterr().out and not any(tmp_path.rglob("*.json"))


def command_sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.mark.parametrize(
    "arguments",
    [
        "bench --rows 0",
        "bench --vocab 0",
        "bench --responses 1",
        "bench --seconds 0",
        "bench --data x.jsonl",
        "bench --name a/b",
        "memory --hidden 8",
        "memory --length 0",
        "memory --model phi-4 --hidden 8 --vocab 8 --layers 1",
    ],
)
def test_wrong_arguments_are_refused_at_once(arguments):
    with pytest.raises(SystemExit):
        main(arguments.split())


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tmp_path, capsys):
    (tmp_path / "file").touch()
    for name in ("bench", "memory"):
        assert main([name, "--out", str(tmp_path / "file" / "x")]) == 2
        assert "--out: cannot write" in capsys.readouterr().out


def test_list(capsys):
    assert main(["bench", "--list", "--device", "cpu"]) == 0
    listed = capsys.readouterr().out
    assert "runs on cuda devices only" in listed and "eager torch" in listed and "rpo_kernels native in place" in listed


def test_memory(tmp_path, capsys):
    arguments = ["--model", "qwen2.5-0.5b", "--length", "4", "--only", "eager", "--card", "80GB"]
    assert main(["memory", *arguments, "--out", str(tmp_path)]) == 0
    data = load_json(one(tmp_path, "memory.json"))
    (entry,) = data["problems"]
    assert entry["results"]["eager torch"]["parts"]["work"] > 0 and entry["predicted"]["rpo_kernels"]
    assert one(tmp_path, "memory.png").stat().st_size > 10_000 and one(tmp_path, "*.pickle")
    assert "| eager torch |" in markdown(tables_of(data))
    assert "does not fit" not in capsys.readouterr().out


def test_predictions_take_a_shape_and_are_for_long_responses(capsys):
    shape = ["--hidden", "4096", "--vocab", "128256", "--layers", "32"]
    assert main(["memory", "--predict", *shape]) == 0
    shown = capsys.readouterr().out
    assert "4096 rows" in shown and "largest K at 2048 tokens" in " ".join(shown.split())
    assert main(["memory", "--predict", "--model", "llama-3.1-405b"]) == 0
    assert "does not fit" in capsys.readouterr().out
    assert main(["memory", "--predict", "--model", "llama-3.1-405b", "--cards", "128"]) == 0
    assert "does not fit" not in capsys.readouterr().out


def failing(data: dict) -> dict:
    """The results, with an implementation that was out of memory and one that was wrong."""
    for entry in data["problems"]:
        for status, name in (("out of memory", "eager torch"), ("wrong", "rpo_kernels in place")):
            if name in entry["results"]:
                entry["results"][name] = {"status": status, "reason": "because"}
    return data


def test_what_failed_is_drawn_and_listed(bench, tmp_path):
    data = failing(load_json(bench))
    assert all(path.stat().st_size > 10_000 for path in draw(data, tmp_path, "x"))
    assert "rpo_kernels in place: wrong, because" in markdown(tables_of(data))
    assert "eager torch: out of memory" in markdown(tables_of(data))


def test_labels_of_what_has_no_bar_stay_inside_the_axes(bench):
    from rpo_kernels.benchmark.charts import _bars

    figure = _bars(failing(load_json(bench))["problems"][:1])
    for ax in figure.axes:
        bottom, top = ax.get_ylim()
        assert all(top < text.get_position()[1] < bottom for text in ax.texts)
        assert len(ax.texts) == len(ax.get_yticks())


@pytest.mark.parametrize("width", [40, 60, 120])
def test_tables_keep_the_names(bench, width):
    console = Console(width=width, file=io.StringIO(), record=True)
    print_tables(console, load_json(bench))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split()[:2] == ["eager", "torch"] for line in lines)


def test_the_other_commit(tmp_path, monkeypatch):
    """Two commits of a repository are measured side by side, each in its own process."""
    root = Path(make_docs.__file__).parents[1]
    if subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a git checkout")
    built = []
    monkeypatch.setattr("rpo_kernels.benchmark.compare.build", built.append)  # compiling takes a minute
    arguments = ["--case", "logits", "--only", "rpo_kernels in place", "--rows", "32", "--time-only"]
    assert main(["bench", *SIZES, *arguments, "--base", "HEAD", "--out", str(tmp_path)]) == 0
    results = load_json(one(tmp_path, "bench.json"))["problems"][0]["results"]
    names = [name for name in results if " @ " in name]
    assert names and all(
        results[name]["step_s"] for name in ("rpo_kernels in place", f"rpo_kernels in place @ {built[0].name}")
    )
    assert not built[0].exists()
    worktrees = subprocess.run(["git", "-C", str(root), "worktree", "list"], capture_output=True, text=True).stdout
    assert str(built[0]) not in worktrees


def test_docs_blocks(bench, tmp_path):
    page = tmp_path / "page.md"
    blocks = [
        f"<!-- begin results: d/r.json{only} -->\nold\n<!-- end results -->\n" for only in ("", " charts", " tables")
    ]
    page.write_text("before\n" + "between\n".join(blocks) + "after\n")
    save_json(load_json(bench), tmp_path / "results" / "d" / "r.json")
    make_docs.fill(page, tmp_path / "results", tmp_path / "charts")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("\n| eager torch |") == 8 and text.count("(charts/d/r-logits.png)") == text.count("between") == 2
    assert (tmp_path / "charts" / "d" / "r-logits.png").exists()
    make_docs.fill(page, tmp_path / "results", tmp_path / "charts")
    assert page.read_text() == text
    page.write_text(text.replace("d/r.json", "d/absent.json"))
    make_docs.fill(page, tmp_path / "results", tmp_path / "charts")
    assert page.read_text() == text.replace("d/r.json", "d/absent.json")


@pytest.mark.parametrize("name", make_docs.PAGES)
def test_the_docs_are_made_from_the_committed_results(tmp_path, name):
    source, page = make_docs.ROOT / "docs" / name, tmp_path / name
    page.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, page)
    make_docs.fill(page, make_docs.ROOT / "bench" / "results", tmp_path / "benchmarks")
    assert page.read_text() == source.read_text()
    for link in make_docs.charts_in(page.read_text()):
        assert (source.parent / link).is_file(), link


def test_the_units_name_the_folder():
    machine = {"device": "AMD EPYC", "driver": None, "units": "avx512_bf16", "threads": 2}
    assert machines.device_slug(machine) == "amd-epyc-avx512_bf16-2-threads"
    assert machines.device_line(machine) == "AMD EPYC (avx512_bf16), 2 threads"
    gpu = {"device": "Some GPU", "driver": "5", "units": None, "threads": 2}
    assert machines.device_slug(gpu) == "some-gpu"
    assert machines.same_setup(machine, dict(machine)) and not machines.same_setup(machine, gpu)


def test_files_are_written_whole(tmp_path):
    path = tmp_path / "a" / "b.json"
    save_json({"x": 1}, path)
    with pytest.raises(TypeError):
        save_json({"x": object()}, path)
    assert json.loads(path.read_text()) == {"x": 1}
    assert [format_bytes(x) for x in (0, 999, 1000, 123456, 999.9e6, 2e12)] == [
        "0 B", "999 B", "1 kB", "123 kB", "1 GB", "2 TB",
    ]  # fmt: skip
