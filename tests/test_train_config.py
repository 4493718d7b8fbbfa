"""Settings: flags, YAML, both; every objective by name; mistakes."""

import math

import pytest

from rpo_kernels import CDPO, DPO, IPO, RPO, DistilledDPO, SimPO
from rpo_kernels.train.config import ObjectiveArguments, parse

GIVEN = ["--model", "some/model", "--train-data", "data.jsonl", "--use_cpu", "true"]


def settings(*argv):
    return parse([*GIVEN, *argv], ())[0]


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], RPO()),
        (["--objective", "rpo", "--distance", "sq", "--beta", "0.2", "--eta", "3"], RPO("sq", beta=0.2, eta=3)),
        (["--length-normalize", "--reference_free", "true"], RPO(length_normalize=True, reference_free=True)),
        (["--target-margin", "inf", "--gamma", "0.5"], RPO(target_margin=math.inf, gamma=0.5)),
        (["--objective", "dpo", "--beta", "0.3"], DPO(beta=0.3)),
        (["--objective", "cdpo", "--epsilon", "0.2"], CDPO(epsilon=0.2)),
        (["--objective", "ipo"], IPO()),
        (["--objective", "simpo", "--gamma", "2"], SimPO(gamma=2)),
        (["--objective", "distilled_dpo", "--eta", "2"], DistilledDPO(eta=2)),
    ],
)
def test_objectives_by_name(argv, expected):
    assert settings(*argv).objective.build() == expected


def test_a_parameter_of_zero_is_a_value():
    assert settings("--objective", "simpo", "--gamma", "0").objective.build() == SimPO(gamma=0.0)
    assert settings("--target-margin", "0").objective.build() == RPO(target_margin=0.0)
    with pytest.raises(ValueError, match="beta must be a positive"):
        ObjectiveArguments(beta=0.0).build()


def test_a_parameter_of_another_objective_is_refused():
    with pytest.raises(ValueError, match=r"'dpo' takes \['beta'\], not \['eta', 'gamma'\]"):
        ObjectiveArguments(objective="dpo", eta=1.0, gamma=2.0).build()


def test_dashes_and_underscores():
    for flag in ("--lora-rank", "--lora_rank"):
        assert settings(flag, "8").model.lora_rank == 8
    assert settings("--learning-rate", "3e-4").training.learning_rate == 3e-4


def test_yaml_and_flags_over_it(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: some/model\ntrain-data: data.jsonl\nobjective: ipo\nbeta: 0.7\nlearning_rate: 1e-5\n"
        "lora_targets: [q_proj, v_proj]\neval_data:\nplot: true\nuse_cpu: true\nlr_scheduler_kwargs: {min_lr: 1.0e-7}\n"
        "lr_scheduler_type: cosine_with_min_lr\n"
    )
    read, demo = parse([str(path), "--learning_rate", "2e-5"], ())
    assert not demo
    assert read.model.model == "some/model" and read.model.lora_targets == ["q_proj", "v_proj"]
    assert read.objective.build() == IPO(beta=0.7)
    assert read.training.learning_rate == 2e-5 and read.training.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert read.run.plot is True and read.data.eval_data is None


def test_demonstration_flags_come_first():
    flags = ["--use_cpu", "true", "--train_data", "demo.jsonl", "--max_length", "99", "--seed", "5"]
    read, demo = parse(["--seed", "6"], flags)
    assert demo and read.data.train_data == "demo.jsonl" and read.data.max_length == 99 and read.training.seed == 6


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--model", "m"], "give both --model and --train-data"),
        ([*GIVEN, "--no-such", "1"], "unknown arguments: --no-such 1"),
        ([*GIVEN, "--beta", "much"], "argument --beta: invalid float value: 'much'"),
        ([*GIVEN, "--beta", "-1"], "beta must be a positive finite number"),
        ([*GIVEN, "--objective", "ppo"], "argument --objective: invalid choice: 'ppo'"),
        ([*GIVEN, "--objective", "dpo", "--eta", "1"], "'dpo' takes"),
        ([*GIVEN, "--beta", "0"], "beta must be a positive finite number"),
        ([*GIVEN, "--max-length", "1"], "max_length must be at least 2, got 1"),
        ([*GIVEN, "--memory-budget", "5XB"], "memory_budget must be bytes"),
        ([*GIVEN, "--gradient-filter", "-1"], "gradient_filter must be at least 0"),
        ([*GIVEN, "--loss-from", "logits", "--memory-budget", "1GB"], "need the loss from hidden states"),
        ([*GIVEN, "--save-strategy", "sometimes"], "sometimes"),
        (["config.json"], "expected a .yaml file or a --flag first, got 'config.json'"),
        (["absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_mistakes(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(argv, ())
    assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("content, message", [("- a\n- b\n", "expected 'name: value' lines"), ("a: [", "cannot read")])
def test_yaml_mistakes(content, message, tmp_path, capsys):
    path = tmp_path / "config.yml"
    path.write_text(content)
    with pytest.raises(SystemExit):
        parse([str(path)], ())
    assert message in capsys.readouterr().err
