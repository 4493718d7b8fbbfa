"""The trainer with shared prompts and batches by tokens: the same training as with separate padded sequences."""

import logging
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from rpo_kernels import RPO
from rpo_kernels.train import BatchForm, RPOTrainer
from rpo_kernels.train.config import parse
from rpo_kernels.train.loss_layer import LossLayer, preference_loss, response_logps
from rpo_kernels.train.trainer import _prompts
from training import arguments, dataset, parameters, tiny_model, with_reference

SIZES = (2, 4, 3)


def data(count: int = 9):
    return with_reference(dataset(count, SIZES))


def run(tmp_path, form: BatchForm, source: str = "head", **changes) -> tuple[list[dict], torch.Tensor]:
    """The logs of three steps of three groups, and the weights after them."""
    model = tiny_model()
    args = arguments(tmp_path, per_device_train_batch_size=3, logging_steps=1, learning_rate=1e-2, **changes)
    trainer = RPOTrainer(model, args, RPO(beta=0.5), data(), loss_layer=LossLayer(source), batch_form=form)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry], parameters(model)


@pytest.mark.parametrize("source", ["head", "logits"])
def test_the_same_training_in_every_form(tmp_path, source):
    """Losses, metrics, gradient norms and weights over three steps; with and without a token budget."""
    forms = {
        "padded": BatchForm(),
        "padded by tokens": BatchForm(max_tokens=150),
        "shared": BatchForm(shared=True),
        "shared by tokens": BatchForm(shared=True, max_tokens=60),
    }
    logs, weights = run(tmp_path, forms.pop("padded"), source, optim="sgd")
    for name, form in forms.items():
        ours, own_weights = run(tmp_path, form, source, optim="sgd")
        for found, expected in zip(ours, logs, strict=True):
            for key in ("loss", "grad_norm", "accuracy", "margin", "logp_best", "scored_tokens", "truncated_tokens"):
                assert found[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-6), (name, key)
        torch.testing.assert_close(own_weights, weights, rtol=1e-4, atol=1e-6)


def test_evaluation_gives_the_same_in_every_form(tmp_path):
    """Over batches split by tokens, whose groups come back in order."""
    results = []
    for form in (BatchForm(), BatchForm(shared=True, max_tokens=40)):
        args = arguments(tmp_path, per_device_eval_batch_size=4)
        trainer = RPOTrainer(tiny_model(), args, RPO(beta=0.5), eval_dataset=data(7), batch_form=form)
        results.append(trainer.evaluate())
        tables = [trainer.prediction_step(trainer.model, batch, True)[1] for batch in trainer.get_eval_dataloader()]
        results[-1]["rewards"] = torch.cat([table[2].sum(-1) for table in tables])
    for key in ("eval_loss", "eval_accuracy", "eval_margin", "eval_logp_best", "eval_scored_tokens"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-4), key
    torch.testing.assert_close(results[0]["rewards"], results[1]["rewards"])


@pytest.mark.parametrize("kind", ["lora", "checkpointing", "bf16", pytest.param("compile", marks=pytest.mark.slow)])
def test_with_other_ways_of_training(kind):
    """The loss and its gradients under PEFT, gradient checkpointing, autocast and torch.compile."""
    results = []
    for form in (BatchForm(), BatchForm(shared=True)):
        model = tiny_model()
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
            torch.manual_seed(0)
            for name, weight in model.named_parameters():
                if "lora" in name:
                    torch.nn.init.normal_(weight, std=0.1)
        if kind == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        if kind == "compile":
            model.model.compile(backend="aot_eager", dynamic=True)
        batch = form(list(data(4)))["micro_batches"][0]
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
            loss = preference_loss(model, batch, RPO(beta=0.5), LossLayer("head")).loss
        loss.backward()
        results.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])))
    tolerance = 2e-2 if kind == "bf16" else 1e-5
    (expected, gradient), (loss, own) = results
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    assert (own - gradient).norm() <= 2 * tolerance * gradient.norm()


@pytest.fixture
def warnings_of_transformers(caplog, monkeypatch):
    """What is logged through transformers' logger, which does not propagate."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    return caplog


def test_a_model_that_is_not_exact_takes_the_padded_form(warnings_of_transformers):
    """Found on the first micro-batch of the run's own data: here the states depend on the place in a long row."""
    model, examples = tiny_model(), list(data(3))
    longest = len(examples[0].prompt) + max(map(len, examples[0].responses))

    def place_dependent(module, args):
        hidden = args[0]
        return (hidden + 0.1 * (torch.arange(hidden.shape[1]) >= longest)[:, None],)

    model.model.norm.register_forward_pre_hook(place_dependent)
    assert not BatchForm.of(model, "auto", examples=examples).shared
    text = warnings_of_transformers.text
    assert "first micro-batch" in text and "padded" in text
    with pytest.raises(ValueError, match="does not compute the same with shared prompts"):
        BatchForm.of(model, "on", examples=examples)
    assert BatchForm.of(tiny_model(), "on", examples=examples).shared
    assert not BatchForm.of(tiny_model(), "off", examples=examples).shared


def test_no_group_is_lost_or_cut():
    """A group above the budget is a micro-batch of its own; every token of the others is within it."""
    examples = list(data(20))
    examples[5].prompt = list(range(1, 100))
    for form in (BatchForm(True, 50), BatchForm(False, 120)):
        batch = form(examples)
        parts = batch["micro_batches"]
        assert sorted(g for part in parts for g in part["groups"]) == list(range(20))
        assert all(part["input_ids"].numel() <= form.max_tokens or len(part["groups"]) == 1 for part in parts)
        assert next(part for part in parts if 5 in part["groups"])["groups"] == [5]
        for part in parts:
            assert _prompts(part) == [examples[g].prompt for g in part["groups"]]
            torch.testing.assert_close(
                part["rewards"].tolist(), [r for g in part["groups"] for r in examples[g].rewards]
            )
        assert batch["computed_tokens"] == sum(part["input_ids"].numel() for part in parts)
        assert batch["real_tokens"] <= batch["computed_tokens"] <= batch["padded_tokens"]


def test_rows_under_a_dense_mask_stay_short():
    """Without max_tokens: under SDPA rows of 4,096 tokens, where blocks are skipped one row."""
    examples = [replace(example, prompt=[1] * 1000) for example in data(9)]
    form = BatchForm.of(tiny_model())
    assert form.shared and form.dense
    assert [len(part["groups"]) for part in form(examples)["micro_batches"]] == [3, 3, 3]
    assert len(replace(form, dense=False)(examples)["micro_batches"]) == 1


def test_responses_of_one_token_train(tmp_path):
    """Cut to two tokens, as many tokens are scored as there are responses."""
    short = with_reference(dataset(5, SIZES, max_length=2))
    for form in (BatchForm(), BatchForm(shared=True)):
        trainer = RPOTrainer(tiny_model(), arguments(tmp_path), RPO(), short, batch_form=form)
        assert trainer.train().training_loss > 0


def test_groups_above_the_budget_are_named(warnings_of_transformers):
    examples = list(data(4))
    examples[2].prompt = list(range(1, 100))
    BatchForm.of(tiny_model(), max_tokens=90, examples=examples)
    assert "group 3 of 4" in warnings_of_transformers.text


def test_logs_say_what_was_saved(tmp_path):
    shared, _ = run(tmp_path, BatchForm(shared=True))
    padded, _ = run(tmp_path, BatchForm())
    assert all(0.2 < entry["tokens_saved"] < 0.9 and entry["tokens_per_second"] > 0 for entry in shared)
    assert all(entry["tokens_saved"] == 0 for entry in padded)


def test_flags(tmp_path, capsys):
    """In YAML, where on and off are true and false, and out of range."""
    path = tmp_path / "run.yaml"
    path.write_text("shared_prompts: on\nmax_tokens: 512\n")
    settings, _ = parse([str(path)], [])
    assert settings.run.shared_prompts == "on" and settings.run.max_tokens == 512
    assert parse([], [])[0].run.shared_prompts == "auto"
    with pytest.raises(SystemExit):
        parse(["--max-tokens", "0"], [])
    assert "max_tokens must be at least 1" in capsys.readouterr().err


def test_reference_log_probabilities_are_those_of_separate_sequences():
    model, examples = tiny_model(), list(data(5))
    batches = [form(examples)["micro_batches"][0] for form in (BatchForm(), BatchForm(shared=True))]
    for source in ("head", "logits"):
        expected, found = (response_logps(model, batch, LossLayer(source)) for batch in batches)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
