"""The command line, run as a user would: the demonstration, own data, resuming, mistakes."""

import functools
import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from rpo_kernels.cli import COMMANDS, main

pytest.importorskip("transformers")
SMALL = ["--max_train_groups", "12", "--max_eval_groups", "4"]
SMALL += ["--per_device_train_batch_size", "4", "--warmup_steps", "0"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main([]) == 2
    assert main(["fly"]) == 2
    assert "unknown command 'fly'" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "torch" in text and torch.__version__ in text and "native" in text and "triton" in text


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr("rpo_kernels.train.command.main", interrupted)
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "rpo-kernels train: interrupted; --resume goes on from what was saved\n"


def test_an_interruption_in_the_first_seconds_is_one_line():
    argv = [sys.executable, "-m", "rpo_kernels.cli", "train"]
    # Where this runs in the background of a shell, SIGINT is ignored and would stay so.
    usual = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    started = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, preexec_fn=usual)
    assert started.stderr.readline() == "rpo-kernels train: loading torch and transformers\n"
    time.sleep(0.3)
    started.send_signal(signal.SIGINT)
    _, error = started.communicate(timeout=60)
    assert started.returncode == 130
    assert error == "rpo-kernels train: interrupted; --resume goes on from what was saved\n"


def test_metrics_reach_tensorboard(tmp_path, monkeypatch):
    """By the names that metrics.json has them under."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    assert main(["train", *SMALL, "--num_train_epochs", "1", "--report-to", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    metrics = json.loads((tmp_path / "rpo-demo" / "metrics.json").read_text())
    logged = [entry for entry in metrics["history"] if "loss" in entry]
    for name in ("loss", "accuracy", "margin", "drift", "logp_best", "tokens_per_second", "grad_norm"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx([entry[name] for entry in logged], rel=1e-6)
    assert events.Scalars("eval/margin")[0].value == metrics["before"]["eval_margin"]


def test_a_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in [name for name in sys.modules if name.startswith("rpo_kernels.train")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["train"]) == 1
    assert 'pip install "rpo-kernels[train]"' in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_is_there_at_once(argv):
    """Neither torch nor transformers is imported for it."""
    code = f"import sys, rpo_kernels.cli as cli; assert cli.main({argv}) == 0; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "--train-data" in ran.stdout or "train a model" in ran.stdout
    assert not {"torch", "numpy", "transformers"} & set(ran.stdout.splitlines()[-1].split())


def test_names_are_imported_when_they_are_used():
    code = (
        "import sys, rpo_kernels; assert 'torch' not in sys.modules; from rpo_kernels import RPO, rpo_loss\n"
        "import rpo_kernels.train as train; assert 'transformers' not in sys.modules; train.RPOTrainer\n"
        "assert rpo_kernels.losses.rpo_loss is rpo_loss and 'rpo_loss' in dir(rpo_kernels)\n"
        "try: rpo_kernels.nothing\n"
        "except AttributeError as error: print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "module 'rpo_kernels' has no attribute 'nothing'\n"


def test_demonstration_in_small(tmp_path, capsys):
    assert main(["train", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "held-out (4 groups)" in text and "rpo-demo/curves.png" in text
    metrics = json.loads((tmp_path / "rpo-demo" / "metrics.json").read_text())
    assert metrics["before"]["eval_accuracy"] == 0.5
    for prefix in ("training", "eval"):
        assert metrics["after"][f"{prefix}_loss"] < metrics["before"][f"{prefix}_loss"]
    assert (tmp_path / "rpo-demo" / "curves.png").read_bytes().startswith(b"\x89PNG")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "rpo-demo")
    AutoTokenizer.from_pretrained(tmp_path / "rpo-demo")


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory):
    """A directory with a tiny model and its tokenizer."""
    from training import write_model

    path = tmp_path_factory.mktemp("model")
    write_model(path)
    return path


@pytest.fixture
def config(saved_model, tmp_path):
    """A YAML file for pairs of messages."""
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"Count to {n}"}],
            "chosen": [{"role": "assistant", "content": " ".join(map(str, range(1, n + 1)))}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "score_chosen": 2.0,
            "score_rejected": -1.0,
        }
        for n in range(1, 9)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {saved_model}\ntrain_data: pairs.jsonl\noutput_dir: out\nlearning_rate: 1.0e-2\nmax_length: 64\n"
        "use_cpu: true\nsave_steps: 2\nlr_scheduler_type: constant\n"
    )
    return path


def test_lora_with_another_reference(config, saved_model, tmp_path):
    pytest.importorskip("peft")
    argv = ["train", str(config), "--lora-rank", "4", "--ref-model", str(saved_model), "--objective", "dpo"]
    assert main(argv) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["before"]["training_margin"] == pytest.approx(0, abs=1e-4)
    assert metrics["after"]["training_loss"] < metrics["before"]["training_loss"]
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_bad_data_is_reported_without_a_traceback(config, tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "chosen": "a"}\n')
    assert main(["train", str(config), "--train-data", "bad.jsonl"]) == 1
    assert "bad.jsonl:1: keys ['chosen', 'prompt'] fit no known form" in capsys.readouterr().err
    assert main(["train", str(config), "--train-data", "absent.jsonl"]) == 1
    assert "no preference data at absent.jsonl" in capsys.readouterr().err
    assert main(["train", str(config), "--model", "absent.gguf"]) == 1
    assert "no model file at absent.gguf" in capsys.readouterr().err
    assert main(["train", str(config), "--model", "./absent"]) == 1
    assert "./absent" in capsys.readouterr().err
