"""`RPOTrainer` on TRL's `DPOTrainer`: against TRL where both train DPO, and against `preference_loss` by hand."""

import datasets
import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from trl_trainers import CHOSEN, GENERATION, PROMPTS, assert_same, model, pairs, record, tokenizer, train  # noqa: E402

if GENERATION != "fused head":
    pytest.skip(f"TRL {trl.__version__} has no fused LM head", allow_module_level=True)

from rpo_kernels import DPO, IPO, RPO, SimPO, preference_loss, token_logprobs  # noqa: E402
from rpo_kernels.integrations.trl import RPOConfig, RPOTrainer, patch, patching  # noqa: E402

RESPONSES = [[" good", " bad", " ugly one"], [" a", " b"], [" x"], [" y", " z z", " w", " v v v"]]
REWARDS = [[1.0, 0.5, -1.0], [0.0, 2.0], [1.0], [0.1, 0.2, 0.4, 0.3]]
LORA = dict(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def groups(**columns):
    return datasets.Dataset.from_dict(dict(prompt=PROMPTS, responses=RESPONSES, rewards=REWARDS, **columns))


def build(
    path, data, objective=None, *, ref_model=True, peft_config=None, eval_dataset=None, processor=True, **settings
):
    defaults = dict(
        output_dir=str(path),
        max_steps=2,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        save_strategy="no",
    )
    return RPOTrainer(
        model(),
        model(seed=1) if ref_model else None,
        RPOConfig(**(defaults | settings)),
        objective,
        processing_class=tokenizer() if processor else None,
        train_dataset=data,
        eval_dataset=eval_dataset,
        peft_config=peft_config,
    )


def by_hand(trainer, examples, objective):
    """The objective on examples of text, from the models' own logits."""
    logps, ref_logps, labels, rewards, ids = [], [], [], [], []
    for number, example in enumerate(examples):
        for response, reward in zip(example["responses"], example["rewards"]):
            prompt = tokenizer()(example["prompt"])["input_ids"]
            tokens = torch.tensor([*prompt, *tokenizer()(response + "</s>")["input_ids"]])
            target = tokens.clone()
            target[: len(prompt)] = -100
            for policy, into in ((trainer.model, logps), (trainer.ref_model, ref_logps)):
                logits = policy(input_ids=tokens[None]).logits
                into.append(token_logprobs(logits, target[None], shift=True).sum())
            labels.append(0)
            rewards.append(reward)
            ids.append(number)
    return preference_loss(
        torch.stack(logps)[:, None],
        torch.tensor(labels)[:, None],
        torch.tensor(rewards),
        ref_logps=torch.stack(ref_logps),
        objective=objective,
        group_ids=ids,
    )


def test_it_trains_dpo_as_trl_does(tmp_path):
    """Same losses and weights; of the metrics, TRL counts a tie as a wrong answer and this package as half a one."""
    expected = train("DPO", tmp_path / "theirs", patched=False)
    trainer = build(tmp_path / "ours", pairs(), DPO(beta=0.1), seed=0)
    ours = record(trainer)
    for run in (ours, expected):
        for entry in run.history:
            entry.pop("rewards/accuracies", None)
    assert_same(ours, expected)


@pytest.mark.parametrize(
    "objective",
    [RPO(beta=0.5), RPO("sq", eta=0.3), lambda a, r, present: (a * r).sum(-1)],
    ids=["bwd_kl", "sq", "a function"],
)
def test_groups_of_any_size(objective, tmp_path):
    trainer = build(tmp_path, groups(), objective, eval_dataset=groups())
    expected = by_hand(trainer, groups(), objective)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected.loss.item(), rel=1e-4)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(expected.accuracy.item())
    assert metrics["eval_rewards/margins"] == pytest.approx(expected.margin.item(), rel=1e-4)
    best, worst = [0, 4, 5, 8], [2, 3, 5, 6]  # of the ten responses
    for name, which in (("chosen", best), ("rejected", worst)):
        assert metrics[f"eval_logps/{name}"] == pytest.approx(expected.logps[which].mean().item(), rel=1e-4)
        rewards = expected.implicit_rewards[which].mean().item()
        assert metrics[f"eval_rewards/{name}"] == pytest.approx(rewards, rel=1e-3, abs=1e-5)


def test_it_learns_the_order_of_rewards(tmp_path):
    trainer = build(tmp_path, groups(), RPO(beta=1.0), max_steps=20, per_device_train_batch_size=4)
    trainer.train()
    first, *_, last, _ = trainer.state.log_history
    assert last["loss"] < 0.5 * first["loss"] and last["rewards/accuracies"] > 0.9
    assert {"entropy", "num_tokens", "logits/chosen", "mean_token_accuracy"} <= set(last)


def test_a_precomputed_reference_is_the_same(tmp_path):
    theirs = record(build(tmp_path / "a", groups(), RPO()))
    trainer = build(tmp_path / "b", groups(), RPO(), precompute_ref_log_probs=True, eval_dataset=groups())
    assert [len(values) for values in trainer.train_dataset["ref_logps"]] == [4] * 4  # padded to the widest group
    assert_same(record(trainer), theirs)
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("truncation", [dict(), dict(max_length=14), dict(max_length=14, truncation_mode="keep_end")])
def test_shared_prompts_train_the_same(truncation, tmp_path):
    """Each prompt once in a row or before each response: the same losses, metrics and weights."""
    options = dict(ref_model=False, peft_config=peft.LoraConfig(**LORA)) if not truncation else {}
    trainers = [
        build(tmp_path / form, groups(), RPO(beta=0.5), shared_prompts=form, seed=0, **options, **truncation)
        for form in ("on", "off")
    ]
    rows = [next(iter(trainer.get_train_dataloader()))["input_ids"] for trainer in trainers]
    if truncation.get("truncation_mode") != "keep_end":
        assert len(rows[0]) == 1 and rows[0].numel() < rows[1].numel()
    assert_same(*(record(trainer) for trainer in trainers))


def test_a_model_that_cannot_share_is_named(tmp_path):
    policy = model()
    policy.config._attn_implementation = "flash_attention_2"
    args = RPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], shared_prompts="on")
    with pytest.raises(ValueError, match="flash_attention_2"):
        RPOTrainer(policy, model(seed=1), args, processing_class=tokenizer(), train_dataset=groups())


def test_an_adapter_and_its_reference(tmp_path):
    """The reference is the model without the adapter: the first step is at the reference."""
    trainer = build(tmp_path, groups(), RPO(), ref_model=False, peft_config=peft.LoraConfig(**LORA))
    trainer.train()
    first, second, _ = trainer.state.log_history
    assert trainer.ref_model is None and first["rewards/margins"] == 0 != second["rewards/margins"]


def test_an_objective_without_a_reference_loads_none(tmp_path):
    trainer = build(tmp_path, groups(), SimPO(), ref_model=False)
    trainer.train()
    assert trainer.ref_model is None and "ref_logps" not in trainer.train_dataset.column_names
    assert trainer.args.precompute_ref_log_probs  # of its own copy of the settings


@pytest.mark.slow
def test_accumulation_and_a_chat(tmp_path):
    chat = tokenizer()
    turn, ask = "<{{ m.role }}>{{ m.content }}", "{% if add_generation_prompt %}<assistant>{% endif %}"
    chat.chat_template = "{% for m in messages %}" + turn + "{% endfor %}" + ask
    messages = [[dict(role="user", content=prompt)] for prompt in PROMPTS]
    answers = [[[dict(role="assistant", content=text)] for text in texts] for texts in RESPONSES]
    data = datasets.Dataset.from_dict(dict(prompt=messages, responses=answers, rewards=REWARDS))
    settings = dict(output_dir=str(tmp_path), max_steps=1, report_to=[], use_cpu=True, bf16=False, save_strategy="no")
    args = RPOConfig(**settings, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = RPOTrainer(model(), model(seed=1), args, processing_class=chat, train_dataset=data)
    decoded = chat.decode(trainer.train_dataset[0]["prompt_ids"] + trainer.train_dataset[0]["responses_ids"][1])
    assert decoded == f"<user>{PROMPTS[0]}<assistant>{RESPONSES[0][1]}"
    trainer.train()


def test_rewards_of_pairs(tmp_path):
    """In columns one names, and not needed where the order says all."""
    data = pairs(score_a=[1.0, 2.0, 3.0, 4.0], score_b=[0.0, 0.0, 5.0, 1.0])
    trainer = build(tmp_path, data, RPO(), reward_columns=["score_a", "score_b"])
    assert trainer.train_dataset["rewards"][2] == [3.0, 5.0]
    assert build(tmp_path, pairs(), IPO()).train_dataset["rewards"][0] == [1.0, 0.0]
    with pytest.raises(ValueError, match="chosen_reward"):
        build(tmp_path, pairs(), RPO())


def test_settings_name_an_objective(tmp_path):
    config = RPOConfig(
        str(tmp_path), use_cpu=True, bf16=False, beta=0.3, objective_kwargs='{"eta": 0.5, "distance": "sq"}'
    )
    assert config.make_objective() == RPO("sq", beta=0.3, eta=0.5)
    config = RPOConfig(str(tmp_path), use_cpu=True, bf16=False, objective="simpo")
    assert config.make_objective() == SimPO()
    for wrong in (dict(objective="best"), dict(objective_kwargs={"wrong": 1})):
        with pytest.raises(ValueError, match=r"best|wrong"):
            RPOConfig(str(tmp_path), use_cpu=True, bf16=False, **wrong).make_objective()


def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="loss_type"):
        build(tmp_path, groups(), loss_type=["hinge"])
    with pytest.raises(ValueError, match="RPOConfig"):
        RPOTrainer(model(), args=trl.DPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=groups())
    with pytest.raises(ValueError, match="responses and rewards"):
        build(tmp_path, datasets.Dataset.from_dict(dict(prompt=PROMPTS, completion=CHOSEN)))
    with pytest.raises(ValueError, match="3 responses and 1 rewards"):
        build(tmp_path, datasets.Dataset.from_dict(dict(prompt=["a"], responses=[["b", "c", "d"]], rewards=[[1.0]])))


def test_a_patch_keeps_its_settings(tmp_path):
    trainer = build(tmp_path, groups(), RPO(), max_steps=1, memory_budget="1MB")
    trainer.train()
    assert patching._active is None
    with patch(memory_budget="2MB") as handle:
        trainer.train()
        assert patching._active is handle and handle.memory_budget == "2MB"
