"""`rpo-kernels train` in two and in four processes under DDP is `rpo-kernels train` in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file

import one_of_several
from rpo_kernels.cli import main
from training import write_groups, write_model

# Per optimizer step four groups in every case; of the ten groups the last step of an epoch has two.
BATCHES = {1: (2, 2), 2: (1, 2), 4: (1, 1)}


def flags(tmp_path: Path, processes: int) -> list[str]:
    size, accumulation = BATCHES[processes]
    words = ["train", "--model", tmp_path / "model", "--train-data", tmp_path / "train.jsonl"]
    words += ["--eval-data", tmp_path / "test.jsonl", "--output-dir", tmp_path / f"of-{processes}"]
    words += ["--cache-dir", tmp_path / f"cache-{processes}", "--max-length", 64, "--num-train-epochs", 2]
    words += ["--per-device-train-batch-size", size, "--gradient-accumulation-steps", accumulation]
    words += ["--per-device-eval-batch-size", 2, "--optim", "sgd", "--learning-rate", 0.05, "--beta", 0.5]
    words += ["--max-grad-norm", 30, "--save-strategy", "no", "--eval-strategy", "epoch", "--disable-tqdm", "true"]
    words += ["--use-cpu", "true", *(["--ddp-backend", "gloo", "--max-tokens", 90] if processes > 1 else [])]
    return [str(word) for word in words]


@pytest.fixture
def started():
    """A function that starts the command in that many processes; they end with the test."""
    running: list[subprocess.Popen] = []

    def start(processes: int, tmp_path: Path) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        script = Path(one_of_several.__file__)
        path = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(processes),
            "PYTHONPATH": path,
        }
        for rank in map(str, range(processes)):
            own = {**os.environ, **common, "OMP_NUM_THREADS": "1", "RANK": rank, "LOCAL_RANK": rank}
            with open(tmp_path / f"{rank}-of-{processes}.log", "w") as log:
                argv = [sys.executable, str(script), *flags(tmp_path, processes)]
                running.append(subprocess.Popen(argv, env=own, stdout=log, stderr=log))
        return running[-processes:]

    yield start
    for process in running:
        process.kill()


def test_several_processes_train_as_one_does(tmp_path, started):
    """Ragged groups, accumulation, a last step with fewer groups than processes, processes with different numbers of
    micro-batches of a few tokens: losses, gradient norms, weights."""
    write_model(tmp_path / "model")
    write_groups(tmp_path / "train.jsonl", 10, (2, 4, 3))
    write_groups(tmp_path / "test.jsonl", 7, (3, 2), seed=1)
    processes = {count: started(count, tmp_path) for count in (2, 4)}
    assert main(flags(tmp_path, 1)) == 0
    expected = json.loads((tmp_path / "of-1" / "metrics.json").read_text())
    weights = load_file(tmp_path / "of-1" / "model.safetensors")
    assert [entry["step"] for entry in expected["history"] if "grad_norm" in entry] == [1, 2, 3, 4, 5, 6]
    for count, workers in processes.items():
        codes = [worker.wait(timeout=300) for worker in workers]
        assert codes == [0] * count, (tmp_path / f"0-of-{count}.log").read_text()[-3000:]
        found = json.loads((tmp_path / f"of-{count}" / "metrics.json").read_text())
        for run in ("before", "after"):
            compare(found[run], expected[run])
        assert len(found["history"]) == len(expected["history"])
        for ours, theirs in zip(found["history"], expected["history"], strict=True):
            compare(ours, theirs)
        for name, tensor in load_file(tmp_path / f"of-{count}" / "model.safetensors").items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=1e-6)


def compare(found: dict, expected: dict) -> None:
    """All figures but those of speed and padding, and the epoch, which counts micro-batches."""
    timed = ("runtime", "per_second", "tokens_saved", "preparation_time", "total_flos", "epoch")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if not name.endswith(timed):
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
