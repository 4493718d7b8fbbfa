"""Profiling: inputs and truth, providers, memory traces, predictions against measurements."""

import math
import pickle

import pytest
import torch

from rpo_kernels.benchmark import memory, providers
from rpo_kernels.benchmark.bench import check, verdict
from rpo_kernels.benchmark.capacity import fits, largest, predict, predict_eager
from rpo_kernels.benchmark.memory import measure_peaks, split_peak
from rpo_kernels.benchmark.models import MODELS, find_model
from rpo_kernels.benchmark.problem import BETA, Inputs, Problem, find_truth, sequences_of
from rpo_kernels.benchmark.timing import interleave, spread

LOGITS = Problem("logits", "test", 4, 8, 700, 0, dtype="float32")
HEAD = Problem("head", "test", 4, 8, 700, 16, dtype="float32", softcap=30.0, logit_scale=0.5)


def named(level: str, name: str) -> providers.Provider:
    return next(p for p in providers.providers(level) if p.name == name)


@pytest.mark.parametrize("problem", [LOGITS, HEAD, HEAD._replace(frozen=True), LOGITS._replace(responses=4)])
def test_truth_is_autograd_in_float64(problem):
    inputs = Inputs.make(problem)
    truth = find_truth(inputs, columns=50)
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.leaves.items()}
    logits = leaves.get("logits")
    if logits is None:
        logits = leaves["hidden"] @ leaves.get("weight", inputs.weight.detach().double()).T * problem.logit_scale
    if problem.softcap:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    logps = torch.distributions.Categorical(logits=logits).log_prob(inputs.labels).sum(-1)
    groups = (BETA * logps).reshape(problem.responses, -1)
    loss = (groups.logsumexp(0) - groups[0]).mean()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    assert all(error < 1e-9 for error in truth.errors(loss.detach(), logps.detach(), grads).values())
    assert set(truth.grads) == set(inputs.leaves)


@pytest.mark.parametrize("problem", [LOGITS, HEAD, HEAD._replace(frozen=True)])
def test_providers_that_load_are_right(problem):
    """All but the compiled ones, whose compilation the benchmark suite pays for."""
    checked = []
    for provider in providers.providers(problem.level):
        if "compile" in provider.name or "Liger" in provider.name:
            continue
        try:
            run = provider.load(problem)
        except providers.Unavailable as reason:
            assert str(reason)
            continue
        inputs = Inputs.make(problem)
        outcome = verdict(check(run, inputs, find_truth(inputs), provider.inplace), problem, provider.approximate)
        assert outcome["status"] == "ok", (provider.name, outcome)
        assert torch.equal(Inputs.make(problem).labels, inputs.labels)
        checked.append(provider.name)
    assert {"rpo_kernels", "eager torch"} <= set(checked)


def test_a_wrong_provider_is_reported_wrong():
    def off_by_one(inputs):
        logps = inputs.logits.log_softmax(-1).gather(-1, (inputs.labels + 1).remainder(700).unsqueeze(-1))
        return inputs.loss(logps.squeeze(-1))

    def nan(inputs):
        return inputs.loss(inputs.logits.sum(-1) * math.nan)

    inputs = Inputs.make(LOGITS)
    for run in (off_by_one, nan):
        assert verdict(check(run, inputs, find_truth(inputs), False), LOGITS, False)["status"] == "wrong"


def test_missing_and_foreign_providers_say_why():
    missing = providers.Provider("x", "logits", lambda _: None, None, "no-such-distribution", False, False)
    assert missing.unavailable_reason("cpu") == "no-such-distribution is not installed"
    assert measure_peaks(missing, [LOGITS], None)[0]["status"] == "unavailable"
    gpu = missing._replace(package=None, device="cuda")
    with pytest.raises(providers.Unavailable, match="cuda"):
        gpu.load(LOGITS)
    with pytest.raises(ValueError, match="no-such-thing"):
        providers.providers("head", ["no-such-thing"])


def test_inplace_providers_leave_the_logits_as_they_were():
    inputs = Inputs.make(LOGITS)
    before = inputs.logits.detach().clone()
    provider = named("logits", "rpo_kernels in place")
    samples = interleave({provider.name: provider.load(LOGITS)}, inputs, {provider.name}, 0.0)
    assert torch.equal(inputs.logits, before)
    assert len(samples[provider.name].forward_s) == 3 and min(samples[provider.name].backward_s) > 0


def test_peak_of_a_trace():
    def event(action, addr, size=0):
        return {"action": action, "addr": addr, "size": size}

    trace = [event("alloc", 1, 100), event("alloc", 2, 50), event("free_completed", 1), event("free_completed", 9)]
    trace += [event("alloc", 1, 60), event("alloc", 3, 30), event("free_completed", 2), event("free_completed", 3)]
    # The peak is [100, 50]; the block at 1 that is a gradient in the end came later.
    assert split_peak(trace, {1}) == {"gradients": 0, "work": 150}
    assert split_peak(trace[1:], {1}) == {"gradients": 60, "work": 80}


PROBLEM = Problem("head", "test", 2, 128, 24000, 128, dtype="float32")


@pytest.mark.parametrize("name", ["rpo_kernels", "rpo_kernels 64MB budget", "eager torch"])
def test_predicted_memory_is_measured_memory(name, tmp_path):
    predicted = predict_eager(PROBLEM) if name == "eager torch" else predict(PROBLEM, "64MB" if "64" in name else None)
    (result,) = measure_peaks(named("head", name), [PROBLEM], None, tmp_path)
    assert result["status"] == "ok", result
    traced = sum(result["parts"].values())
    assert abs(result["peak_bytes"] / traced - 1) < 0.1
    assert -0.02 < predicted.extra / traced - 1 < 0.1
    snapshot = pickle.loads((tmp_path / result["snapshot"]).read_bytes())
    page = torch.cuda._memory_viz.trace_plot(snapshot)
    assert "<html" in page.lower() or "script" in page


def test_too_little_memory_is_a_result():
    problems = [PROBLEM._replace(length=n) for n in (16, 256, 512)]
    results = measure_peaks(named("head", "eager torch"), problems, limit=150_000_000)
    assert [r["status"] for r in results] == ["ok", "out of memory", "out of memory"]
    assert "smaller" in results[2]["reason"]


def test_a_process_that_dies_is_a_result(monkeypatch):
    monkeypatch.setattr(memory.sys, "executable", "false")
    (result,) = measure_peaks(named("head", "eager torch"), [PROBLEM], None)
    assert result["status"] == "failed" and "exit status 1" in result["reason"]


def test_capacity_grows_with_the_card_and_with_this_package():
    model = find_model("llama-3.1-8b")
    problem = Problem("head", "x", 2, 2048, model.vocab, model.hidden, device="cuda", frozen=True)

    def longest(card: int, ours: bool) -> int:
        return largest(lambda n: fits(problem._replace(length=n), model, "lora", card, ours))

    assert 0 < longest(24_000_000_000, False) < longest(80_000_000_000, False) < longest(80_000_000_000, True)
    assert longest(10_000_000_000, True) == 0
    n = longest(80_000_000_000, True)
    assert fits(problem._replace(length=n), model, "lora", 80_000_000_000, True)
    assert not fits(problem._replace(length=n + 1), model, "lora", 80_000_000_000, True)


def test_sizes():
    assert sequences_of(8192, 2) == (16, 512)
    assert sequences_of(64, 4) == (4, 16)
    assert all(m.hidden * m.vocab < m.parameters * 1e9 for m in MODELS.values())
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0
    with pytest.raises(ValueError, match="gpt-9"):
        find_model("gpt-9")
