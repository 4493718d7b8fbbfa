"""Reference log-probabilities: right, computed once, kept through interruptions, keyed by what they depend on."""

import json

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rpo_kernels.train import NonFiniteError, attach_reference_logps, batches
from training import arguments, dataset, tiny_model


def direct(model, example):
    """Sum of log-probabilities of each response, one at a time, in plain torch and float64."""
    sums = []
    for response in example.responses:
        ids = torch.tensor([example.prompt + response])
        with torch.no_grad():
            logps = model(input_ids=ids).logits.double().log_softmax(-1)[0, :-1]
        sums.append(logps.gather(-1, ids[0, 1:, None])[len(example.prompt) - 1 :].sum())
    return torch.stack(sums)


def attach(data, model, tmp_path, **changes):
    return attach_reference_logps(data, model, arguments(tmp_path, **changes), cache_dir=tmp_path / "cache")


@pytest.fixture
def forward_passes(monkeypatch):
    """Counts the batches that reach the reference model."""
    calls = []
    original = batches.response_logps
    monkeypatch.setattr(batches, "response_logps", lambda *args: (calls.append(1), original(*args))[1])
    return calls


def test_values_and_cache(tmp_path, forward_passes):
    model, train, held_out = tiny_model(), dataset(5, sizes=(2, 3)), dataset(3, seed=1)
    assert attach([train, held_out], model, tmp_path) == 8
    for example in list(train) + list(held_out):
        torch.testing.assert_close(
            torch.tensor(example.ref_logps).double(), direct(model, example), rtol=1e-5, atol=1e-4
        )
    passes = len(forward_passes)
    again = dataset(5, sizes=(2, 3))
    assert attach([again], model, tmp_path) == 0 and len(forward_passes) == passes
    assert [e.ref_logps for e in list(again)] == [e.ref_logps for e in list(train)]


def test_an_interrupted_pass_continues_where_it_stopped(tmp_path, monkeypatch, forward_passes):
    model, data = tiny_model(), dataset(6)
    counted = batches.response_logps

    def fails_at_third(*args):
        if len(forward_passes) == 2:
            raise KeyboardInterrupt
        return counted(*args)

    monkeypatch.setattr(batches, "response_logps", fails_at_third)
    with pytest.raises(KeyboardInterrupt):
        attach([data], model, tmp_path)
    monkeypatch.setattr(batches, "response_logps", counted)
    (file,) = (tmp_path / "cache").iterdir()
    # The last line was cut short, as by a lost machine.
    file.write_bytes(file.read_bytes()[:-9])
    forward_passes.clear()
    assert attach([data], model, tmp_path) == 3
    assert len(forward_passes) == 2
    assert attach([dataset(6)], model, tmp_path) == 0
    torch.testing.assert_close(torch.tensor(data[3].ref_logps).double(), direct(model, data[3]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "broken",
    [
        b"\xff\xfe not text",
        b"[1, 2]",
        b'{"key": 1, "logps": [1, 2, 3]}',
        b'{"logps": [1, 2, 3]}',
        b'{"key": "KEY", "logps": [-1]}',
        b'{"key": "KEY", "logps": ["a", "b", "c"]}',
        b'{"key": "KEY", "logps": [NaN, 0, 0]}',
    ],
)
def test_a_broken_entry_is_computed_again(tmp_path, broken):
    data = dataset(3)
    attach([data], tiny_model(), tmp_path)
    (file,) = (tmp_path / "cache").iterdir()
    lines = file.read_bytes().splitlines()
    lines[1] = broken.replace(b"KEY", data.keys()[1].encode())
    file.write_bytes(b"\n".join(lines) + b"\n")
    again = dataset(3)
    assert attach([again], tiny_model(), tmp_path) == 1
    # Alone in a batch it rounds otherwise.
    assert again.ref_logps.tolist() == pytest.approx(data.ref_logps.tolist(), rel=1e-5)
    assert attach([dataset(3)], tiny_model(), tmp_path) == 0


def test_a_reference_that_gives_nan_stops_the_run(tmp_path):
    model = tiny_model()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(NonFiniteError, match="the reference gives group 1 the log-probabilities"):
        attach([dataset(2)], model, tmp_path)


def test_only_what_is_new_is_computed(tmp_path):
    model = tiny_model()
    assert attach([dataset(4)], model, tmp_path) == 4
    assert attach([dataset(6)], model, tmp_path) == 2
    assert attach([dataset(6, max_length=12)], model, tmp_path) == 6


def test_changed_model_or_precision_is_another_reference(tmp_path):
    assert attach([dataset(2)], tiny_model(seed=0), tmp_path) == 2
    assert attach([dataset(2)], tiny_model(seed=1), tmp_path) == 2
    assert attach([dataset(2)], tiny_model(seed=0, rms_norm_eps=1e-3), tmp_path) == 2
    assert attach([dataset(2)], tiny_model(seed=0), tmp_path, bf16=True) == 2
    assert attach([dataset(2)], tiny_model(seed=0).bfloat16(), tmp_path) == 2
    assert attach([dataset(2)], tiny_model(seed=0), tmp_path) == 0
    lines = [path.read_text().splitlines() for path in (tmp_path / "cache").iterdir()]
    assert len(lines) == 5 and all(len(json.loads(line)["logps"]) == 3 for file in lines for line in file)


def test_adapter_is_off(tmp_path):
    peft = pytest.importorskip("peft")
    plain, data = tiny_model(), dataset(3)
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    ids = pad_sequence([torch.tensor(e.prompt) for e in data], batch_first=True)
    assert not torch.allclose(adapted(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-2)
    assert attach([data], adapted, tmp_path) == 3
    for example in data:
        torch.testing.assert_close(
            torch.tensor(example.ref_logps).double(), direct(plain, example), rtol=1e-5, atol=1e-4
        )
    # The plain model is the same reference.
    assert attach([dataset(3)], plain, tmp_path) == 0


def test_model_is_left_as_it_was(tmp_path):
    model = tiny_model(attention_dropout=0.5)
    model.train()
    first, second = dataset(2), dataset(2)
    attach([first], model, tmp_path)
    attach_reference_logps([second], model, arguments(tmp_path), cache_dir=tmp_path / "other")
    assert model.training
    assert [e.ref_logps for e in list(first)] == [e.ref_logps for e in list(second)]
