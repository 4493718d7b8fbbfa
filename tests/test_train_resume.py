"""Runs that are interrupted, resumed, finished, broken: through the command, on a model of 0.03 million parameters."""

import json
import resource

import pytest
import torch

pytest.importorskip("transformers")
from filelock import FileLock
from safetensors.torch import load_file

from rpo_kernels.cli import main
from rpo_kernels.train import RPOTrainer, checkpoints
from training import write_groups, write_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model, data and an uninterrupted run of eight steps in two epochs."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model")
    write_groups(folder / "train.jsonl", 8, (3, 2))
    write_groups(folder / "other.jsonl", 9, (3, 2), seed=1)
    assert main(command(folder, "whole")) == 0
    return folder


def command(folder, output, *more):
    words = ["train", "--model", folder / "model", "--train-data", folder / "train.jsonl"]
    words += ["--output-dir", folder / output, "--cache-dir", folder / "cache", "--max-length", 48]
    words += ["--num-train-epochs", 2, "--learning-rate", 1e-2, "--beta", 0.5, "--save-steps", 2]
    words += ["--disable-tqdm", "true", "--use-cpu", "true"]
    return [str(word) for word in [*words, *more]]


class Interrupted(BaseException):
    """As by a signal: not an error that anything would handle."""


@pytest.fixture
def interrupted(whole, monkeypatch):
    """A function that begins a run which is interrupted in its sixth step, after checkpoints 2 and 4."""

    def begin(output, *more):
        original = RPOTrainer.training_step

        def step(trainer, *args):
            if trainer.state.global_step == 5:
                raise Interrupted
            return original(trainer, *args)

        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            patch.setattr(RPOTrainer, "training_step", step)
            main(command(whole, output, *more))
        assert checkpoints.by_step(whole / output)[0].name == "checkpoint-4"
        return whole / output

    return begin


def metrics(output):
    return json.loads((output / "metrics.json").read_text())


def check_same(output, whole):
    """The same weights, losses and first evaluation to the last bit."""
    ours, theirs = (load_file(path / "model.safetensors") for path in (output, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [[entry["loss"] for entry in metrics(path)["history"] if "loss" in entry] for path in (output, whole)]
    assert losses[0] == losses[1] and len(losses[1]) == 8
    assert metrics(output)["before"]["training_loss"] == metrics(whole)["before"]["training_loss"]
    assert metrics(output)["finished"] and not (output / checkpoints.ASIDE).exists()


def test_a_resumed_run_is_the_uninterrupted_one(whole, interrupted, capsys):
    output = interrupted("resumed")
    assert main(command(whole, "resumed")) == 1
    assert "holds checkpoints of an earlier run: continue it with --resume" in capsys.readouterr().err
    # The same groups in a step, dealt otherwise; where it logs and saves does not matter.
    assert main(command(whole, "resumed", "--resume", "--save-steps", "3", "--logging-steps", "1")) == 0
    assert f"resuming from {output / 'checkpoint-4'}" in capsys.readouterr().out
    check_same(output, whole / "whole")


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--beta", "0.4"], "beta: 0.5 then, 0.4 now"),
        (["--objective", "dpo"], "objective: rpo then, dpo now"),
        (["--max-length", "40"], "max_length: 48 then, 40 now"),
        (["--seed", "7"], "seed: 42 then, 7 now"),
        (["--learning-rate", "1e-3"], "learning_rate: 0.01 then, 0.001 now"),
        (["--per-device-train-batch-size", "4"], "groups a step: 2 then, 4 now"),
        (["--lora-rank", "2"], "lora_rank: 0 then, 2 now"),
        (["--max-train-groups", "7"], "training data: 8 groups"),
        (["--train-data", "other.jsonl"], "training data: 8 groups"),
        (["--eval-data", "other.jsonl"], "eval data: not given then, 9 groups"),
        (["--model", "other-model"], "model: "),
        (["--num-train-epochs", "3"], "--extend takes other steps and epochs"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_run_is_not_resumed_with_other_settings(whole, changes, message, capsys, monkeypatch):
    monkeypatch.chdir(whole)
    if not (whole / "other-model").exists():
        write_model(whole / "other-model", seed=1)
    before = metrics(whole / "whole")
    assert main(command(whole, "whole", "--resume", *changes)) == 1
    error = capsys.readouterr().err
    assert "was begun with other settings" in error and message in error
    assert metrics(whole / "whole") == before


def test_a_finished_run_is_kept_extended_or_overwritten(whole, capsys):
    write = ["--num-train-epochs", "1"]
    assert main(command(whole, "done", *write)) == 0
    capsys.readouterr()
    assert main(command(whole, "done", *write)) == 1
    assert "holds a finished run: choose another --output-dir, or remove it with --overwrite" in capsys.readouterr().err
    assert main(command(whole, "done", *write, "--resume")) == 0
    assert "finished: nothing to do" in capsys.readouterr().out
    steps = [entry["step"] for entry in metrics(whole / "done")["history"] if "loss" in entry]
    assert main(command(whole, "done", "--resume", "--extend")) == 0
    assert steps == [1, 2, 3, 4]
    assert len([entry for entry in metrics(whole / "done")["history"] if "loss" in entry]) == 8
    assert main(command(whole, "done", *write, "--overwrite", "--save-strategy", "no")) == 0
    assert not checkpoints.by_step(whole / "done") and metrics(whole / "done")["finished"]


def test_broken_checkpoints_are_passed_over(whole, interrupted, capsys):
    output = interrupted("broken")
    optimizer = output / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    (output / "checkpoint-6").mkdir()
    assert main(command(whole, "broken", "--resume")) == 0
    out = capsys.readouterr().out
    assert "passed over checkpoint-6: it has no checkpoint.json: it was not written to its end" in out
    assert "passed over checkpoint-4: optimizer.pt holds" in out and "resuming from" in out
    check_same(output, whole / "whole")


def test_without_a_complete_checkpoint_nothing_is_resumed(whole, interrupted, capsys):
    output = interrupted("all-broken")
    (output / "checkpoint-4" / "scheduler.pt").unlink()
    (output / "checkpoint-2" / "checkpoint.json").write_text("{")
    assert main(command(whole, "all-broken", "--resume")) == 1
    error = capsys.readouterr().err
    assert "holds no complete checkpoint" in error and "checkpoint-4: scheduler.pt is missing" in error
    assert "checkpoint-2: its checkpoint.json cannot be read" in error
    argv = command(whole, "new", "--resume-from-checkpoint", str(output / "checkpoint-4"))
    assert main(argv) == 2 and "scheduler.pt is missing" in capsys.readouterr().err


def test_a_full_disk_leaves_the_checkpoints_before(whole, interrupted, capsys):
    output = interrupted("full")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))  # less than the weights take
    try:
        assert main(command(whole, "full", "--resume")) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "cannot write" in error and "checkpoint-6; checkpoints before it are intact" in error
    assert main(command(whole, "full", "--resume")) == 0
    check_same(output, whole / "whole")


def test_the_best_checkpoint_is_kept_and_loaded(whole):
    """With a learning rate that makes things worse after the first two steps."""
    best = ["--eval-data", str(whole / "train.jsonl"), "--eval-strategy", "steps", "--eval-steps", "2"]
    best += ["--load-best-model-at-end", "true", "--metric-for-best-model", "eval_loss", "--save-total-limit", "1"]
    assert main(command(whole, "best", *best, "--learning-rate", "0.3")) == 0
    output = whole / "best"
    losses = {entry["step"]: entry["eval_loss"] for entry in metrics(output)["history"] if "eval_runtime" in entry}
    assert list(losses) == [2, 4, 6, 8] and min(losses, key=losses.get) != 8
    kept = output / f"checkpoint-{min(losses, key=losses.get)}"
    assert kept.exists() and checkpoints.defect(kept) is None
    state = json.loads((kept / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(kept)
    ours, theirs = (load_file(path / "model.safetensors") for path in (output, kept))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_one_run_at_a_time(whole, capsys):
    (whole / "held").mkdir()
    with FileLock(whole / "held" / ".lock"):
        assert main(command(whole, "held")) == 1
    assert "another run is writing to" in capsys.readouterr().err
    (whole / "file").touch()
    assert main(command(whole, "file/below")) == 1
    assert "cannot write to --output-dir" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run(whole, capsys):
    """Weights of 1e30 after the first step."""
    argv = command(whole, "nan", "--learning-rate", "1e30", "--save-steps", "1", "--plot")
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "step 2 has loss" in error and "gradient norm nan" in error and "lower --learning-rate" in error
    assert "with the prompts\n  '" in error
    output = whole / "nan"
    assert metrics(output)["stopped"].startswith("step 2") and not metrics(output)["finished"]
    assert [entry["step"] for entry in metrics(output)["history"]] == [1]
    assert checkpoints.defect(output / "checkpoint-1") is None and not (output / "model.safetensors").exists()
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
