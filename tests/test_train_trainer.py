"""RPOTrainer: its loss, gradients and metrics against direct computation; resuming; saving; two processes."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rpo_kernels import DPO, RPO, SimPO
from rpo_kernels.objectives import ranking_metrics
from rpo_kernels.train import Group, NonFiniteError, PreferenceDataset, RPOTrainer, attach_reference_logps
from rpo_kernels.train.config import ModelArguments
from rpo_kernels.train.demo import tokenizer
from rpo_kernels.train.models import add_adapter
from training import arguments, dataset, groups, parameters, tiny_model, with_reference


def trainer(model, data, tmp_path, objective=RPO(beta=0.5), eval_data=None, **changes):
    return RPOTrainer(
        model, arguments(tmp_path, **changes), objective, data, eval_dataset=eval_data, processing_class=tokenizer()
    )


def direct_groups(model, data, objective):
    """Per group: loss, implicit rewards, rewards, log-probabilities; one response at a time, in plain torch."""
    rows = []
    for example in data:
        logps = []
        for response in example.responses:
            ids = torch.tensor([example.prompt + response])
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            logps.append(log_p.gather(-1, ids[0, 1:, None])[len(example.prompt) - 1 :].sum())
        logps = torch.stack(logps)
        ratios = logps if objective.reference_free else logps - torch.tensor(example.ref_logps)
        if objective.length_normalize:
            ratios = ratios / torch.tensor([float(len(r)) for r in example.responses])
        rewards = torch.tensor(example.rewards)
        rows.append((objective(ratios[None], rewards[None])[0], objective.beta * ratios, rewards, logps))
    return rows


def test_one_process_takes_one_gpu(tmp_path):
    """Trainer would wrap the model in nn.DataParallel."""
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.warns(UserWarning, match="torchrun"):
        made = RPOTrainer(tiny_model(), args, processing_class=tokenizer())
    assert made.args.n_gpu == 1 and made.model is made._wrap_model(made.model, training=False)


@pytest.mark.parametrize("sizes", [(3,), (2, 4, 3)], ids=["even", "ragged"])
@pytest.mark.parametrize("objective", [RPO("sq", beta=0.5), DPO(), SimPO()], ids=["sq", "dpo", "simpo"])
def test_evaluation_equals_direct_computation(tmp_path, objective, sizes):
    model, data = tiny_model(), with_reference(dataset(5, sizes))
    metrics = trainer(model, data, tmp_path, objective).evaluate(data)
    model.eval()
    with torch.no_grad():
        rows = direct_groups(model, data, objective)
    assert metrics["eval_loss"] == pytest.approx(torch.stack([row[0] for row in rows]).mean().item(), rel=1e-4)
    agreeing, pairs, margins, best, worst = 0, 0, [], [], []
    for _, implicit, rewards, logps in rows:
        share, margin = ranking_metrics(implicit[None], rewards[None])
        count = len(rewards) * (len(rewards) - 1) // 2
        agreeing, pairs = agreeing + share.item() * count, pairs + count
        margins.append(margin.item())
        best.append(logps[rewards.argmax()].item())
        worst.append(logps[rewards.argmin()].item())
    assert metrics["eval_accuracy"] == pytest.approx(agreeing / pairs)
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 5, rel=1e-3, abs=1e-5)
    assert metrics["eval_logp_best"] == pytest.approx(sum(best) / 5, rel=1e-4)
    assert metrics["eval_logp_worst"] == pytest.approx(sum(worst) / 5, rel=1e-4)
    assert metrics["eval_scored_tokens"] == sum(len(r) for e in data for r in e.responses)
    assert metrics["eval_truncated_tokens"] == 0


def test_one_step_is_the_direct_gradient_and_logs_the_direct_loss(tmp_path):
    """Accumulation over micro-batches of 2, 2 and 1 ragged groups: one SGD step on the mean over all 5."""
    data, objective = with_reference(dataset(5, (2, 4, 3), max_length=14)), RPO(beta=0.5)
    model, expected = tiny_model(), tiny_model()
    torch.stack([row[0] for row in direct_groups(expected, data, objective)]).mean().backward()
    with torch.no_grad():
        loss = torch.stack([row[0] for row in direct_groups(expected, data, objective)]).mean().item()
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad
    changes = dict(gradient_accumulation_steps=3, optim="sgd", learning_rate=0.1, max_grad_norm=0.0)
    run = trainer(model, data, tmp_path, objective, **changes)
    run.train()
    torch.testing.assert_close(parameters(model), parameters(expected), rtol=1e-4, atol=1e-6)
    (log,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert log["loss"] == pytest.approx(loss, rel=1e-4)
    assert log["scored_tokens"] == sum(len(r) for e in data for r in e.responses)
    assert log["truncated_tokens"] == sum(e.truncated_tokens for e in data) > 0
    assert 0 <= log["accuracy"] <= 1 and log["logp_best"] < 0


def test_accumulation_does_not_change_training(tmp_path):
    """Ten groups in steps of six and four, however they are split: the smaller last step is a mean as well."""
    data, losses, models = with_reference(dataset(10)), [], []
    for batch in (6, 3, 2, 1):
        models.append(tiny_model())
        changes = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=6 // batch, optim="sgd")
        run = trainer(models[-1], data, tmp_path, **changes)
        run.train()
        losses.append([entry["loss"] for entry in run.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    for split, model in zip(losses[1:], models[1:], strict=True):
        assert split == pytest.approx(losses[0], rel=1e-4)
        torch.testing.assert_close(parameters(model), parameters(models[0]), rtol=1e-4, atol=1e-6)


def test_training_improves_accuracy_with_every_logged_metric(tmp_path):
    data = with_reference(dataset(6))
    run = trainer(tiny_model(), data, tmp_path, num_train_epochs=5, eval_data=data, eval_strategy="epoch")
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss"] < before["eval_loss"] and after["eval_accuracy"] > before["eval_accuracy"]
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    keys = {"loss", "accuracy", "margin", "logp_best", "logp_worst", "scored_tokens", "truncated_tokens"}
    assert all(keys <= set(entry) for entry in logs)
    evaluations = [entry for entry in run.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 6 and all({f"eval_{key}" for key in keys} <= set(entry) for entry in evaluations)


def test_log_covers_all_groups_since_the_last(tmp_path):
    data = with_reference(dataset(7))
    run = trainer(tiny_model(), data, tmp_path, logging_steps=4, learning_rate=0.0)
    run.train()
    (log,) = [entry for entry in run.state.log_history if "loss" in entry]
    whole = run.evaluate(data)
    assert log["accuracy"] == pytest.approx(whole["eval_accuracy"])
    assert log["margin"] == pytest.approx(whole["eval_margin"], rel=1e-4)
    assert log["scored_tokens"] == whole["eval_scored_tokens"]


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_resumed_run_equals_uninterrupted_run(tmp_path, lora):
    if lora:
        peft = pytest.importorskip("peft")

    def model():
        made = tiny_model(attention_dropout=0.1)
        return peft.get_peft_model(made, peft.LoraConfig(r=2, target_modules="all-linear")) if lora else made

    data = with_reference(dataset(8))
    changes = dict(num_train_epochs=2, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine")
    whole = trainer(model(), data, tmp_path / "whole", **changes)
    whole.train()

    broken = trainer(model(), data, tmp_path / "broken", **changes)
    step = broken.training_step

    def fails_at_fifth(*args, **kwargs):
        if broken.state.global_step == 5:
            raise Interrupt
        return step(*args, **kwargs)

    broken.training_step = fails_at_fifth
    with pytest.raises(Interrupt):
        broken.train()
    resumed = trainer(model(), data, tmp_path / "broken", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))

    losses = [[e["loss"] for e in run.state.log_history if "loss" in e] for run in (whole, resumed)]
    assert len(losses[0]) == 8 and losses[0] == losses[1]
    torch.testing.assert_close(parameters(resumed.model), parameters(whole.model), rtol=0, atol=0)


def test_saved_model_loads_with_from_pretrained(tmp_path):
    data = with_reference(dataset(4))
    run = trainer(tiny_model(), data, tmp_path)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    tok = AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Wie spät ist es? Drei - oder vier."
    assert tok.decode(tok(text)["input_ids"]) == text
    assert tok(text)["input_ids"] == tokenizer()(text)["input_ids"] and tok.pad_token_id == 0
    ids = torch.tensor([tok(text)["input_ids"]])
    run.model.eval()
    torch.testing.assert_close(model(ids).logits, run.model(ids).logits)


def test_missing_reference_is_named(tmp_path):
    run = trainer(tiny_model(), dataset(3), tmp_path)
    for act in (run.train, lambda: run.evaluate(dataset(2))):
        with pytest.raises(ValueError, match=r"groups have no reference log-probabilities.*attach_reference_logps"):
            act()


def test_the_group_with_a_loss_that_is_not_finite_is_named(tmp_path):
    """A squared distance to 1e30 leaves float32; the other groups of the step are not suspects."""
    chosen = groups(4)
    chosen[2] = Group("the odd one", ["a", "b"], [1e30, 0.0])
    data = with_reference(PreferenceDataset(chosen, tokenizer(), 64))
    model = tiny_model()
    start = parameters(model)
    run = trainer(model, data, tmp_path, RPO("sq"), gradient_accumulation_steps=2)
    with pytest.raises(NonFiniteError, match=r"step 1 has loss inf .*with the prompts\n  'the odd one'\nThe weights"):
        run.train()
    assert torch.equal(parameters(model), start)


def test_dropped_columns_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"args\.remove_unused_columns must be False"):
        trainer(tiny_model(), dataset(3), tmp_path, remove_unused_columns=True)


def test_user_objective(tmp_path):
    data = with_reference(dataset(4))
    metrics = trainer(tiny_model(), data, tmp_path, lambda ratios, rewards, present: ratios.square().mean(-1))
    assert math.isfinite(metrics.evaluate(data)["eval_loss"])


def test_mixed_precision_starts_at_the_reference(tmp_path):
    model, data = tiny_model(), dataset(4)
    run = trainer(model, data, tmp_path, bf16=True, num_train_epochs=6)
    attach_reference_logps([data], model, run.args, cache_dir=tmp_path)
    metrics = run.evaluate(data)
    assert metrics["eval_accuracy"] == 0.5 and metrics["eval_margin"] == 0
    run.train()
    assert run.evaluate(data)["eval_loss"] < metrics["eval_loss"]


def test_lora_trains_under_gradient_checkpointing(tmp_path):
    """The same gradients as without, although what is checkpointed starts at a frozen embedding."""
    pytest.importorskip("peft")
    data, trained = with_reference(dataset(4)), []
    for checkpointing in (False, True):
        model = add_adapter(tiny_model(), ModelArguments(lora_rank=2))
        start = parameters(model)
        trainer(model, data, tmp_path, gradient_checkpointing=checkpointing, optim="sgd", learning_rate=1.0).train()
        trained.append(parameters(model) - start)
    assert trained[0].norm() > 1e-3
    torch.testing.assert_close(trained[1], trained[0])
