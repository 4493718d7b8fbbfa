"""Runs killed at random moments, fifty times: nothing is lost, and the weights are those of a run left alone.

Some minutes long. RPO_KERNELS_SEED picks the moments.
"""

import multiprocessing
import os
import random
import time

import pytest
import torch

pytest.importorskip("transformers")
from safetensors.torch import load_file

from rpo_kernels.cli import main
from rpo_kernels.train import checkpoints
from training import write_groups, write_model

KILLS = 50


def command(folder, output):
    words = ["train", "--model", folder / "model", "--train-data", folder / "train.jsonl", "--output-dir", output]
    words += ["--cache-dir", f"{output}-cache", "--num-train-epochs", 10, "--learning-rate", 1e-3, "--save-steps", 1]
    words += ["--save-total-limit", 2, "--disable-tqdm", "true", "--use-cpu", "true", "--resume"]
    return [str(word) for word in words]


def newest(output) -> int:
    """The step of the newest complete checkpoint."""
    found = checkpoints.newest_complete(output)[0] if checkpoints.by_step(output) else None
    return 0 if found is None else int(found.name.rpartition("-")[2])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_lost_in_fifty_kills(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    seed = int(os.environ.get("RPO_KERNELS_SEED", random.randrange(10**6)))
    print(f"RPO_KERNELS_SEED={seed}")
    moments = random.Random(seed)
    write_model(tmp_path / "model")
    write_groups(tmp_path / "train.jsonl", 8)
    # The server has imported everything, and never ran backward: its children start at once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rpo_kernels.train.run"])

    def start(output) -> multiprocessing.Process:
        process = context.Process(target=main, args=(command(tmp_path, output),))
        process.start()
        return process

    begin = time.monotonic()
    start(tmp_path / "whole").join()
    length = time.monotonic() - begin
    expected = load_file(tmp_path / "whole" / "model.safetensors")

    kills, runs = 0, 0
    while kills < KILLS:
        output, runs, step = tmp_path / f"killed-{runs}", runs + 1, 0
        process = start(output)
        # In the end the run is left to finish; until then it has time for a few steps, or for none.
        while process.is_alive() and kills < KILLS:
            process.join(moments.uniform(0, length / 3))
            if process.is_alive():
                process.kill()
                process.join()
                kills += 1
                assert newest(output) >= step, f"step {step} was complete before this kill"
                step = newest(output)
                process = start(output)
        process.join()
        assert process.exitcode == 0
        weights = load_file(output / "model.safetensors")
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    print(f"{kills} kills over {runs} runs")
