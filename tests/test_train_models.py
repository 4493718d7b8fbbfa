"""Models as they come: adapters, dropout, leftovers of a .gguf file; through the command."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Mamba2Config  # noqa: E402

from rpo_kernels.cli import main  # noqa: E402
from rpo_kernels.train.demo import tokenizer  # noqa: E402
from rpo_kernels.train.loss_layer import LossLayer  # noqa: E402
from rpo_kernels.train.models import disable_dropout, load_config, load_model  # noqa: E402
from training import parameters, tiny_model, write_groups, write_model  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, data, and a LoRA adapter trained on them."""
    path = tmp_path_factory.mktemp("models")
    write_model(path / "model")
    write_groups(path / "train.jsonl", 8)
    assert main(command(path, "model", "adapter", "--lora-rank", "2", "--learning-rate", "0.1")) == 0
    return path


def command(folder, model, output, *more):
    words = [
        "train",
        "--model",
        folder / model,
        "--train-data",
        folder / "train.jsonl",
        "--output-dir",
        folder / output,
    ]
    words += ["--cache-dir", folder / "cache", "--save-strategy", "no", "--beta", 0.5, "--learning-rate", 1e-2]
    return [str(word) for word in [*words, "--disable-tqdm", "true", "--use-cpu", "true", *more]]


def metrics(output):
    return json.loads((output / "metrics.json").read_text())


def test_an_adapter_is_continued_merged_or_refused(folder, capsys):
    for extra in ([], ["--lora-rank", "2"]):
        assert main(command(folder, "adapter", "refused", *extra)) == 1
        error = capsys.readouterr().err
        assert "is a LoRA adapter: train it further with --adapter continue" in error and "--adapter merge" in error
    argv = command(folder, "adapter", "refused", "--adapter", "continue", "--lora-rank", "2")
    assert main(argv) == 2 and "leave out --lora-rank, or merge it" in capsys.readouterr().err
    trained = metrics(folder / "adapter")["after"]

    assert main(command(folder, "adapter", "continued", "--adapter", "continue")) == 0
    check_start(metrics(folder / "continued"), trained)
    names = {path.name for path in (folder / "continued").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    first, second = (load_file(folder / name / "adapter_model.safetensors") for name in ("adapter", "continued"))
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)

    assert main(command(folder, "adapter", "merged", "--adapter", "merge", "--learning-rate", "1e-3")) == 0
    check_start(metrics(folder / "merged"), trained)
    assert (folder / "merged" / "model.safetensors").exists()


def check_start(started, trained):
    """At the adapter's own log-probabilities, which are the reference."""
    assert started["before"]["training_drift"] == pytest.approx(0, abs=1e-4)
    for name in ("training_logp_best", "training_logp_worst"):
        assert started["before"][name] == pytest.approx(trained[name], rel=1e-4)
    assert started["after"]["training_loss"] < started["before"]["training_loss"]


def test_a_new_adapter_on_a_merged_one_loads_again(folder):
    """Its base is the merged model, which exists nowhere else."""
    assert main(command(folder, "adapter", "second", "--adapter", "merge", "--lora-rank", "2")) == 0
    assert json.loads((folder / "second" / "adapter_config.json").read_text())["base_model_name_or_path"].endswith(
        "base"
    )
    after = metrics(folder / "second")["after"]
    assert main(command(folder, "second", "third", "--adapter", "continue")) == 0
    assert metrics(folder / "third")["before"]["training_logp_best"] == pytest.approx(
        after["training_logp_best"], rel=1e-4
    )
    AutoModelForCausalLM.from_pretrained(folder / "second")


@pytest.mark.parametrize("kept", [False, True], ids=["off", "kept"])
def test_dropout_is_off_unless_it_is_kept(folder, kept):
    """The first step's loss is the one evaluated before training; the saved config keeps the model's dropout."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=259, n_embd=16, n_layer=2, n_head=2, n_positions=128, embd_pdrop=0.3, attn_pdrop=0.3)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    tokenizer().save_pretrained(folder / "gpt2")
    argv = ["--per-device-train-batch-size", "8", "--disable-dropout", str(not kept).lower(), "--overwrite"]
    assert main(command(folder, "gpt2", "dropout", *argv)) == 0
    found = metrics(folder / "dropout")
    same = found["history"][0]["loss"] == pytest.approx(found["before"]["training_loss"], rel=1e-4)
    assert same != kept
    assert json.loads((folder / "dropout" / "config.json").read_text())["embd_pdrop"] == 0.3


def test_a_policy_that_is_not_its_reference_is_noticed(folder, capsys):
    """Here the cache holds what is not the model's."""
    assert main(command(folder, "model", "right", "--cache-dir", str(folder / "wrong"))) == 0
    assert "warning" not in capsys.readouterr().out
    (file,) = (folder / "wrong" / "reference").iterdir()
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    changed = [entry | {"logps": [entry["logps"][0] + 1, *entry["logps"][1:]]} for entry in entries]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in changed))
    assert main(command(folder, "model", "noticed", "--cache-dir", str(folder / "wrong"))) == 0
    out = capsys.readouterr().out
    assert "warning: policy and reference are the same model" in out and "have an accuracy of 0.5" in out


def test_dropout_of_any_kind():
    """Modules and plain numbers: gradients in training are those in evaluation."""
    model = tiny_model(attention_dropout=0.5)
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens, torch.nn.Dropout(0.5))
    disable_dropout(model)
    ids = torch.arange(1, 9).unsqueeze(0)
    assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_hidden_states_of_another_type_than_the_head_take_the_logits():
    """Mamba 2 keeps its residual stream in float32."""
    sizes = dict(vocab_size=259, hidden_size=32, num_hidden_layers=1, state_size=8, num_heads=4, head_dim=16)
    config = Mamba2Config(**sizes, n_groups=1)
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    assert LossLayer.of(model).source == "logits"
    with pytest.raises(ValueError, match="the loss cannot be computed from hidden states of this model"):
        LossLayer.of(model, "head")


def test_a_quantization_left_by_a_gguf_file_is_dropped(folder):
    """transformers would unpack weights that are not packed."""
    write_model(folder / "from-gguf")
    path = folder / "from-gguf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    assert getattr(load_config(str(folder / "from-gguf")), "quantization_config", None) is None
    torch.testing.assert_close(parameters(load_model(str(folder / "from-gguf"))), parameters(tiny_model()))
    assert main(command(folder, "from-gguf", "plain")) == 0
    assert "quantization_config" not in json.loads((folder / "plain" / "config.json").read_text())
