"""`PreferenceLoss` in transformers' own `Trainer`, against the loss computed by hand from the model's logits."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from rpo_kernels import RPO, SimPO, rpo_loss  # noqa: E402
from rpo_kernels.integrations.transformers import PreferenceLoss, PreferenceOutput  # noqa: E402
from rpo_kernels.train import GroupCollator  # noqa: E402
from training import dataset, parameters, tiny_model, with_reference  # noqa: E402


def trainer(model, loss, path, data, **settings):
    defaults = dict(
        output_dir=str(path),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=1,
        learning_rate=1e-2,
        optim="sgd",
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    args = transformers.TrainingArguments(**(defaults | settings))
    collator = loss.collate(GroupCollator(0))
    options = dict(data_collator=collator, compute_loss_func=loss)
    return transformers.Trainer(model, args, train_dataset=data, eval_dataset=data, **options)


def expected_loss(model, data, objective, reference=True):
    """Mean over all groups, from the model's own logits."""
    losses = []
    for example in data:
        batch = GroupCollator(0)([example])
        output = rpo_loss(
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits,
            batch["labels"],
            batch["rewards"],
            ref_logps=batch["ref_logps"] if reference else None,
            objective=objective,
            num_responses=len(batch["rewards"]),
            shift=True,
        )
        losses.append(output.loss)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("batch, accumulation", [(4, 1), (2, 2), (1, 4)], ids=str)
def test_a_step_is_the_same_however_it_is_split(batch, accumulation, tmp_path):
    """Groups of different sizes; the gradient is that of the mean over all four."""
    model, data, objective = tiny_model(), with_reference(dataset(4, sizes=(3, 2))), RPO(beta=0.5)
    by_hand = copy.deepcopy(model)
    expected_loss(by_hand, data, objective).backward()
    with torch.no_grad():
        for parameter in by_hand.parameters():
            parameter -= 1e-2 * parameter.grad
    loss = PreferenceLoss(model, objective)
    run = trainer(
        model, loss, tmp_path, data, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
    )
    run.train()
    torch.testing.assert_close(parameters(run.model), parameters(by_hand), rtol=1e-5, atol=1e-6)


def test_evaluation(tmp_path):
    model, data = tiny_model(), with_reference(dataset(4))
    metrics = trainer(model, PreferenceLoss(model), tmp_path, data).evaluate()
    assert metrics["eval_loss"] == pytest.approx(float(expected_loss(model, data, RPO())), rel=1e-5)


def test_without_a_reference(tmp_path):
    model, data = tiny_model(), dataset(4)
    metrics = trainer(model, PreferenceLoss(model, SimPO()), tmp_path, data).evaluate()
    expected = expected_loss(model, data, SimPO(), reference=False)
    assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_an_adapter(tmp_path):
    """Given before the adapter or after it, the adapter learns and the rest stays."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    results = []
    for loss_first in (True, False):
        model, data = tiny_model(), with_reference(dataset(4))
        loss = PreferenceLoss(model) if loss_first else None
        transformers.set_seed(0)
        model = peft.get_peft_model(model, config)
        loss = loss or PreferenceLoss(model)
        run = trainer(model, loss, tmp_path, data, max_steps=2)
        run.train()
        results.append({name: p.detach() for name, p in model.named_parameters() if "lora_B" in name})
    assert all(p.abs().sum() > 0 for p in results[0].values())
    torch.testing.assert_close(results[0], results[1])


def test_the_model_is_otherwise_the_same():
    model, other = tiny_model(), tiny_model()
    PreferenceLoss(model)
    tokens = torch.arange(3, 9)[None]
    torch.testing.assert_close(model(input_ids=tokens).logits, other(input_ids=tokens).logits)
    options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(tokens, **options), other.generate(tokens, **options))


def test_bad_input_is_named():
    model = tiny_model()
    loss = PreferenceLoss(model)
    with pytest.raises(ValueError, match="rewards"):
        loss.collate(lambda examples: dict(input_ids=torch.ones(2, 3), labels=torch.ones(2, 3)))([])
    with pytest.raises(ValueError, match="outputs must be a PreferenceOutput"):
        loss(model(input_ids=torch.ones(1, 3, dtype=torch.int64)))
    assert loss(PreferenceOutput(loss=torch.tensor(3.0))) == 3
