"""The benchmark's parts: inputs, truth, implementations, samples, memory traces, predictions against measurements."""

import json
import math
import pickle
import time

import pytest
import torch

from rpo_kernels.benchmark import peaks
from rpo_kernels.benchmark.allocations import split_peak
from rpo_kernels.benchmark.implementations.catalogue import find, find_one
from rpo_kernels.benchmark.implementations.registry import Implementation, LossPass, Unavailable
from rpo_kernels.benchmark.inputs import Inputs, save_states
from rpo_kernels.benchmark.models import MODELS, find_model, own_shape
from rpo_kernels.benchmark.peaks import PeakSettings, measure_peaks
from rpo_kernels.benchmark.predictions import (
    Cards,
    Prompts,
    fits,
    largest,
    largest_fitting_lines,
    predict,
    predict_eager,
)
from rpo_kernels.benchmark.problem import BETA, CASES, Problem, sequences_of
from rpo_kernels.benchmark.references import gemm_dtype, make_references
from rpo_kernels.benchmark.results import spread
from rpo_kernels.benchmark.sampling import Sample, Sampler, interleave
from rpo_kernels.benchmark.timing import check
from rpo_kernels.benchmark.truth import find_truth, verdict

LOGITS = Problem("logits", "test", 4, 8, 700, 0, dtype="float32")
HEAD = Problem("head", "test", 4, 8, 700, 16, dtype="float32", softcap=30.0, logit_scale=0.5)
EVERY = [(HEAD if CASES[case].source == "head" else LOGITS)._replace(case=case) for case in CASES]


@pytest.mark.parametrize("problem", [*EVERY, LOGITS._replace(responses=4)], ids=lambda p: f"{p.case}-{p.responses}")
def test_truth_is_autograd_in_float64(problem):
    inputs = Inputs.make(problem)
    truth = find_truth(inputs, columns=50)
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.named.items()}
    logits = leaves["logits"] if problem.from_logits else leaves["hidden"] @ leaves["weight"].T * problem.logit_scale
    if problem.softcap:
        logits = problem.softcap * torch.tanh(logits / problem.softcap)
    token_logps = torch.distributions.Categorical(logits=logits).log_prob(inputs.labels)
    logps = token_logps.sum(-1)
    groups = (BETA * logps).reshape(problem.responses, -1)
    loss = (groups.logsumexp(0) - groups[0]).mean()
    if problem.case == "rows":
        loss = (token_logps * inputs.grad_logps).sum()
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values()))))
    assert all(error < 1e-9 for error in truth.errors(loss.detach(), logps.detach(), grads).values())
    assert set(truth.grads) == set(inputs.leaves) == set(problem.kind.gradients)


@pytest.mark.parametrize("problem", EVERY, ids=lambda p: p.case)
def test_implementations_that_load_are_right(problem):
    """All but the compiled ones, whose compilation the benchmark suite pays for."""
    checked = []
    for one in find(problem.kind.source):
        if "compile" in one.name or "Liger" in one.name or "triton" in one.name:
            continue
        try:
            run = one.load(problem)
        except Unavailable as reason:
            assert str(reason)
            continue
        inputs = Inputs.make(problem)
        outcome = verdict(check(run, inputs, find_truth(inputs), one.inplace), problem, one.approximate)
        assert outcome["status"] == "ok", (one.name, outcome)
        assert all(torch.equal(x, y) for x, y in zip(Inputs.make(problem).named.values(), inputs.named.values()))
        checked.append(one.name)
    assert set(checked) >= ({"rpo_kernels torch"} if problem.case == "rows" else {"rpo_kernels", "eager torch"})


def test_a_wrong_implementation_is_reported_wrong():
    def off_by_one(inputs):
        logps = inputs.logits.log_softmax(-1).gather(-1, (inputs.labels + 1).remainder(700).unsqueeze(-1))
        return inputs.loss(logps.squeeze(-1))

    def nan(inputs):
        return inputs.loss(inputs.logits.sum(-1) * math.nan)

    inputs = Inputs.make(LOGITS)
    for run in (off_by_one, nan):
        assert verdict(check(LossPass(run), inputs, find_truth(inputs), False), LOGITS, False)["status"] == "wrong"


def test_missing_and_foreign_implementations_say_why():
    missing = Implementation("x", "logits", lambda _: None, package="no-such-distribution")
    assert missing.unavailable_reason("cpu") == "no-such-distribution is not installed"
    assert measure_peaks(missing, [LOGITS], PeakSettings())[0]["status"] == "unavailable"
    with pytest.raises(Unavailable, match="cuda"):
        missing._replace(package=None, device="cuda").load(LOGITS)
    with pytest.raises(ValueError, match="no-such-thing"):
        find("head", ["no-such-thing"])


def test_every_sample_stands_between_its_references():
    inputs = Inputs.make(LOGITS)
    before = inputs.logits.detach().clone()
    one = find_one("logits", "rpo_kernels in place")
    calls = []
    references = {
        name: reference._replace(run=lambda name=name: calls.append(name))
        for name, reference in make_references(LOGITS).items()
    }
    run = one.load(LOGITS)
    logged = LossPass(lambda inputs: (calls.append("step"), run.forward(inputs))[1])
    taken = {}
    interleave({one.name: Sampler(logged, inputs, references, one.inplace)}, 0.0, taken)
    samples = taken[one.name]
    assert torch.equal(inputs.logits, before)
    assert len(samples) == 3 and all(s.step_s > s.forward_s > 0 and s.reference_s["copy"] > 0 for s in samples)
    assert calls == ["copy", "step", "copy"] * 3


def test_slow_implementations_leave_and_the_others_go_on():
    taken = []

    def sampler(name, seconds):
        def take():
            taken.append(name)
            time.sleep(seconds)
            return Sample(seconds, seconds, {})

        return take

    samples = {}
    interleave({"slow": sampler("slow", 0.05), "fast": sampler("fast", 0.001)}, 0.1, samples)
    assert len(samples["slow"]) == 3 < len(samples["fast"])
    assert taken[:6] == ["slow", "fast"] * 3


def test_references_know_the_units():
    half, single = HEAD._replace(dtype="bfloat16"), HEAD
    assert gemm_dtype(single) == "float32"
    assert gemm_dtype(half) in ("float32", "bfloat16")
    assert make_references(half)["gemm"].facts == {"dtype": gemm_dtype(half), "flops": 2 * 32 * 16 * 700}
    assert make_references(LOGITS)["copy"].facts == {"bytes": 2 * 32 * 700 * 4}


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
    (result,) = measure_peaks(find_one("head", name), [PROBLEM], PeakSettings(snapshots=str(tmp_path)))
    assert result["status"] == "ok", result
    traced = sum(result["parts"].values())
    # Of the weight's gradient, pages to which no tile was saved are not resident yet at forward's peak.
    untouched = 0.0 if name == "eager torch" else 0.1
    assert -0.1 - untouched < result["peak_bytes"] / traced - 1 < 0.1
    assert -0.02 < predicted.extra / traced - 1 < 0.1
    snapshot = pickle.loads((tmp_path / result["snapshot"]).read_bytes())
    page = torch.cuda._memory_viz.trace_plot(snapshot)
    assert "<html" in page.lower() or "script" in page


def test_predictions_know_the_backend(monkeypatch):
    """The torch reference makes copies of a tile, which the native kernels do not."""
    problem = PROBLEM._replace(case="head-frozen", length=1024)
    native = predict(problem, "8GB")
    monkeypatch.setattr("rpo_kernels.kernels.dispatch.choose", lambda *_: "torch")
    assert predict(problem, "8GB").total > native.total


def test_too_little_memory_is_a_result():
    problems = [PROBLEM._replace(length=n) for n in (16, 256, 512)]
    results = measure_peaks(find_one("head", "eager torch"), problems, PeakSettings(limit=150_000_000))
    assert [r["status"] for r in results] == ["ok", "out of memory", "out of memory"]
    assert "smaller" in results[2]["reason"]


def test_a_process_that_dies_is_a_result(monkeypatch):
    monkeypatch.setattr(peaks.sys, "executable", "false")
    (result,) = measure_peaks(find_one("head", "eager torch"), [PROBLEM], PeakSettings())
    assert result["status"] == "failed" and "exit status 1" in result["reason"]


def test_capacity_grows_with_the_card_and_with_this_package():
    model = find_model("llama-3.1-8b")
    problem = Problem("head-frozen", "x", 2, 2048, model.vocab, model.hidden, device="cuda")

    def longest(card: int, ours: bool, cards: int = 1) -> int:
        return largest(lambda n: fits(problem._replace(length=n), model, "lora", Cards(card, cards), ours))

    assert 0 < longest(24_000_000_000, False) < longest(80_000_000_000, False) < longest(80_000_000_000, True)
    assert longest(10_000_000_000, True) == 0 < longest(10_000_000_000, True, cards=8)
    n = longest(80_000_000_000, True)
    assert fits(problem._replace(length=n), model, "lora", Cards(80_000_000_000), True)
    assert not fits(problem._replace(length=n + 1), model, "lora", Cards(80_000_000_000), True)


def test_capacity_with_shared_prompts():
    """One copy of a prompt in place of K: more responses fit, and as many where there is no prompt."""
    model = find_model("llama-3.1-8b")
    problem = Problem("head-frozen", "x", 4, 512, model.vocab, model.hidden, responses=4, device="cuda")
    assert [Prompts(1000, shared).tokens(problem) for shared in (False, True)] == [4 * 1512, 1000 + 4 * 512]
    lines = largest_fitting_lines(problem, model, Cards(24_000_000_000), 4096)
    found = {way: int(most.replace(",", "")) for training, way, _, most in lines if training == "lora"}
    assert found["eager torch"] < found["rpo_kernels"] < found["shared prompts"]
    assert not any(line[1] == "shared prompts" for line in largest_fitting_lines(problem, model, Cards(24_000_000_000)))


def test_sizes():
    assert sequences_of(8192, 2) == (16, 512)
    assert sequences_of(64, 4) == (4, 16)
    assert all(m.hidden * m.vocab < m.parameters * 1e9 for m in MODELS.values())
    assert own_shape(4096, 128256, 32, None).parameters == pytest.approx(7.5, abs=0.1)
    assert own_shape(4096, 128256, 32, 8.03).parameters == 8.03
    assert spread([1.0, 1.0, 1.0, 1.0]) == 0
    with pytest.raises(ValueError, match="gpt-9"):
        find_model("gpt-9")


def test_hidden_states_of_real_text(tmp_path, monkeypatch):
    """The labels are the responses' tokens, and the model's logits are those of the states and the head."""
    training = pytest.importorskip("training")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    training.write_model(folder)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "ab", "chosen": "hello there", "rejected": "no"}) + "\n")
    states = save_states(str(folder), data, 8)
    problem = Problem("head", "tiny", 2, 4, states.vocab, states.hidden, dtype="float32", text=data.name)
    inputs = Inputs.make(problem, states.path)
    assert inputs.hidden.shape == (2, 4, states.hidden) and inputs.weight.requires_grad
    logits = Inputs.make(problem._replace(case="logits", hidden=0), states.path).logits
    torch.testing.assert_close(logits, torch.nn.functional.linear(inputs.hidden, inputs.weight))
    assert save_states(str(folder), data, 8).path == states.path
    with pytest.raises(ValueError, match="response tokens, 1000 rows"):
        save_states(str(folder), data, 1000)
