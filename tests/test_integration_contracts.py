"""Integrations with trainers that are not installed here, against contracts written down from their code.

Each stand-in has the names, parameters and results of the trainer's functions, in plain torch, as they are in
verl b178a3cd, OpenRLHF 3c3be623, LLaMA-Factory ff6d4d12, ms-swift 3602360a, axolotl 067b021c and NeMo-RL 7ea279ab.
Nothing here runs the trainers themselves.
"""

import enum
import importlib
import sys
import types

import pytest
import torch

from rpo_kernels import DPO, RPO, SimPO, preference_loss

VOCAB = 37


@pytest.fixture
def install(monkeypatch):
    """A function that makes a stand-in module, and its packages, importable; all is gone after the test."""

    def make(name, **members):
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            path = ".".join(parts[:i])
            if path not in sys.modules:
                module = types.ModuleType(path)
                module.__path__ = []
                module.__spec__ = importlib.machinery.ModuleSpec(path, None, is_package=True)
                monkeypatch.setitem(sys.modules, path, module)
            if i > 1:
                monkeypatch.setattr(
                    sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[path], raising=False
                )
        for key, value in members.items():
            setattr(sys.modules[name], key, value)
        return sys.modules[name]

    return make


@pytest.fixture
def fresh(monkeypatch):
    """An integration's module, imported anew so that it meets the stand-in."""

    def load(name):
        path = f"rpo_kernels.integrations.{name}"
        monkeypatch.delitem(sys.modules, path, raising=False)
        return importlib.import_module(path)

    return load


def make(shape=(4, 6), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(*shape, VOCAB, generator=generator)).to(dtype).requires_grad_()
    return logits, torch.randint(VOCAB, shape, generator=generator)


def gather(logits, labels):
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def entropy_of(logits):
    logps = logits.log_softmax(-1)
    return -(logps.exp() * logps).sum(-1)


def same(ours, theirs, *leaves):
    """Equal values, and equal gradients of a weighted sum of them."""
    ours, theirs = ((x,) if isinstance(x, torch.Tensor) else tuple(x) for x in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5)
    for k, (a, b) in enumerate(zip(ours, theirs)):
        if not b.requires_grad:
            continue
        weight = torch.linspace(-1, 1, a.numel()).view(a.shape) + k
        grads = [torch.autograd.grad((x * weight).sum(), leaves, retain_graph=True) for x in (b, a)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


# verl


@pytest.fixture
def verl(install):
    def logprobs_from_logits(logits, labels, inplace_backward=True):
        return gather(logits, labels)

    class FusedLinearForPPO(torch.nn.Module):
        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            logits = hidden_states @ vocab_weights.t() / temperature
            return gather(logits, input_ids), entropy_of(logits)

    utils = install("verl.utils.torch_functional", logprobs_from_logits=logprobs_from_logits)
    fused = install("verl.utils.experimental.torch_functional", FusedLinearForPPO=FusedLinearForPPO)
    actor = install("verl.workers.actor.dp_actor", logprobs_from_logits=logprobs_from_logits)  # imported by name
    return types.SimpleNamespace(utils=utils, fused=fused, actor=actor)


def test_verl(verl, fresh):
    logits, labels = make()
    hidden = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    own = verl.utils.logprobs_from_logits
    before = verl.fused.FusedLinearForPPO().forward(hidden, weight, labels, temperature=0.7)
    module = fresh("verl")  # as verl imports its external_lib
    assert verl.utils.logprobs_from_logits is verl.actor.logprobs_from_logits is module.logprobs_from_logits
    same(verl.actor.logprobs_from_logits(logits, labels, inplace_backward=False), gather(logits, labels), logits)
    copy = logits * 1
    (grad,) = torch.autograd.grad(verl.utils.logprobs_from_logits(copy, labels).sum(), copy)
    assert grad.data_ptr() == copy.data_ptr()
    same(verl.fused.FusedLinearForPPO()(hidden, weight, labels, temperature=0.7), before, hidden, weight)
    flat = verl.fused.FusedLinearForPPO()(hidden.flatten(0, 1), weight, labels.flatten().int(), temperature=0.7)
    same([x.flatten() for x in before], flat, hidden, weight)
    module.patch().undo()
    assert verl.utils.logprobs_from_logits is verl.actor.logprobs_from_logits is own


def test_a_version_with_other_signatures_is_refused_and_left_as_it_is(verl, fresh):
    def logprobs_from_logits(logits, labels, mask, inplace_backward=True):
        return None

    own = verl.fused.FusedLinearForPPO.forward
    verl.utils.logprobs_from_logits = logprobs_from_logits
    with pytest.raises(RuntimeError, match=r"this version of verl is not .* takes \('logits', 'labels', 'mask'"):
        fresh("verl")
    assert verl.fused.FusedLinearForPPO.forward is own and verl.utils.logprobs_from_logits is logprobs_from_logits


def test_patching_twice_and_undoing_once(verl, fresh):
    own = verl.fused.FusedLinearForPPO.forward
    module = fresh("verl")
    with module.patch(memory_budget="1MB"), module.patch():
        assert verl.fused.FusedLinearForPPO.forward is not own
    assert verl.fused.FusedLinearForPPO.forward is own


def test_trainers_that_are_not_installed_are_named(fresh):
    for name, missing in [("openrlhf", "openrlhf"), ("llama_factory", "llamafactory"), ("ms_swift", "ms-swift")]:
        if importlib.util.find_spec(missing.replace("-", "_").replace("ms_", "")) is None:
            with pytest.raises(ImportError, match=missing):
                fresh(name).patch()
    for name in ("axolotl", "nemo_rl"):
        if importlib.util.find_spec(name) is None:
            with pytest.raises(ImportError, match=f"rpo_kernels.integrations.{name} needs"):
                fresh(name)


# OpenRLHF


def test_openrlhf(install, fresh, monkeypatch, capsys):
    def log_probs_from_logits(logits, labels, temperature=1.0):
        return gather(logits / temperature, labels)

    def compute_entropy(logits):
        return entropy_of(logits)

    install("openrlhf.models.utils", log_probs_from_logits=log_probs_from_logits, compute_entropy=compute_entropy)
    actor = install(
        "openrlhf.models.actor", log_probs_from_logits=log_probs_from_logits, compute_entropy=compute_entropy
    )
    logits, labels = make()
    with fresh("openrlhf").patch():
        assert actor.log_probs_from_logits is not log_probs_from_logits
        same(actor.log_probs_from_logits(logits, labels, temperature=0.8), gather(logits / 0.8, labels), logits)
        same(actor.compute_entropy(logits), entropy_of(logits), logits)
    assert actor.compute_entropy is compute_entropy


def test_a_trainers_command_runs_patched(install, fresh, monkeypatch, tmp_path, capsys):
    install("openrlhf.models.utils", log_probs_from_logits=lambda logits, labels, temperature=1.0: None)
    sys.modules["openrlhf.models.utils"].compute_entropy = lambda logits: None
    program = "import sys, openrlhf.models.utils as u; print(u.compute_entropy.__module__, sys.argv[1:])"
    (tmp_path / "stand_in_cli.py").write_text(f"if __name__ == '__main__':\n    {program}\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = fresh("openrlhf")
    monkeypatch.setattr(sys, "argv", ["-m", "--local_rank=0", "stand_in_cli", "--pretrain", "x"])
    try:
        module.run_patched(module.patch, module.__name__)
    finally:
        module.patch().undo()
    assert capsys.readouterr().out.strip() == "rpo_kernels.integrations.openrlhf ['--local_rank=0', '--pretrain', 'x']"


# LLaMA-Factory


def llama_factory_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    """Sums and numbers of scored tokens, as its code has them."""
    labels, logits = labels[:, 1:].clone(), logits[:, :-1]
    mask = labels != label_pad_token_id
    logps = gather(logits, labels.masked_fill(~mask, 0)) * mask
    lengths = mask.sum(-1)
    if ld_alpha is None:
        return logps.sum(-1), lengths
    pairs = len(labels) // 2
    sums = []
    for row in range(len(labels)):
        shared = min(int(lengths[row % pairs]), int(lengths[row % pairs + pairs]))
        end = int(mask[row].int().argmax()) + shared
        sums.append(logps[row, :end].sum() + ld_alpha * logps[row, end:].sum())
    return torch.stack(sums), lengths


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_llama_factory(install, fresh, ld_alpha):
    install("llamafactory.train.trainer_utils", get_batch_logps=llama_factory_logps)
    trainer = install("llamafactory.train.dpo.trainer", get_batch_logps=llama_factory_logps)
    logits, labels = make((4, 9))
    labels[:, :3] = -100
    labels[1, 5:] = labels[2, 6:] = -100
    expected = llama_factory_logps(logits, labels, ld_alpha=ld_alpha)
    with fresh("llama_factory").patch(inplace_backward=False):
        assert trainer.get_batch_logps is not llama_factory_logps
        same(trainer.get_batch_logps(logits=logits, labels=labels, ld_alpha=ld_alpha), expected, logits)
    with fresh("llama_factory").patch():
        copy = logits * 1
        logps, _ = trainer.get_batch_logps(logits=copy, labels=labels)
        (grad,) = torch.autograd.grad(logps.sum(), copy)
        assert grad.data_ptr() == copy.data_ptr()


# ms-swift


@pytest.mark.parametrize("place", ["swift.rlhf_trainers.rlhf_mixin", "swift.trainers.rlhf_trainer.rlhf_mixin"])
def test_ms_swift(install, fresh, place):
    class RLHFTrainerMixin:
        def get_per_token_logps(self, logits, labels, label_pad_token_id=-100, reduction="mean"):
            mask = labels != label_pad_token_id
            reduced = logits.mean(-1) if reduction == "mean" else logits.sum(-1)
            return gather(logits, labels.masked_fill(~mask, 0)) * mask, reduced.detach() * mask, mask

    install(place, RLHFTrainerMixin=RLHFTrainerMixin)
    trainer = RLHFTrainerMixin()
    trainer.template = types.SimpleNamespace(sequence_parallel_size=1)
    logits, labels = make()
    labels[0, :4] = -100
    expected = [trainer.get_per_token_logps(logits, labels, reduction=how) for how in ("mean", "sum")]
    with fresh("ms_swift").patch():
        for how, theirs in zip(("mean", "sum"), expected):
            ours = trainer.get_per_token_logps(logits, labels, reduction=how)
            same(ours[:2], theirs[:2], logits)
            assert torch.equal(ours[2], theirs[2])
            ours[0].detach()[~ours[2]] = 0  # may be written
        with pytest.raises(ValueError, match="Invalid reduction: median"):
            trainer.get_per_token_logps(logits, labels, reduction="median")
        trainer.template.sequence_parallel_size = 2
        assert torch.equal(trainer.get_per_token_logps(logits, labels)[0], expected[0][0])  # its own


# axolotl


def test_axolotl(install, fresh, monkeypatch):
    pytest.importorskip("trl")
    import trl.trainer.utils as utils

    class BasePlugin:
        def __init__(self):
            pass

    install("axolotl.integrations.base", BasePlugin=BasePlugin)
    module = fresh("axolotl")
    plugin = module.RPOKernelsPlugin()
    path, _, name = plugin.get_input_args().rpartition(".")
    settings = getattr(importlib.import_module(path), name)(rpo_kernels_memory_budget="64MB")
    own = utils.selective_log_softmax
    plugin.register({"rl": None})
    plugin.pre_model_load(None)
    assert utils.selective_log_softmax is own

    def theirs(logits, index):
        return None

    try:
        plugin.register(dict(settings, rl="dpo"))
        ours = utils.selective_log_softmax
        assert ours is not own
        utils.selective_log_softmax = theirs  # what axolotl's patch manager does next
        plugin.pre_model_load(None)
        assert utils.selective_log_softmax == ours
    finally:
        module.patch().undo()
    assert utils.selective_log_softmax is own


# NeMo-RL


@pytest.fixture
def nemo_rl(install, fresh):
    class LossType(enum.Enum):
        SEQUENCE_LEVEL = "sequence_level"

    class LossInputType(enum.Enum):
        LOGPROB = "logprob"

    install("nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType)
    return fresh("nemo_rl")


def nemo_batch(groups=3, length=7):
    generator = torch.Generator().manual_seed(0)
    logps = (-torch.rand(2 * groups, length - 1, generator=generator)).requires_grad_()
    data = dict(
        token_mask=(torch.rand(2 * groups, length, generator=generator) > 0.3).long(),
        reference_policy_logprobs=-torch.rand(2 * groups, length, generator=generator),
        sample_mask=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
        rewards=torch.randn(2 * groups, generator=generator),
    )
    return logps, data


def test_nemo_rl_loss_is_normalised_by_the_global_batch(nemo_rl):
    logps, data = nemo_batch()
    loss_fn = nemo_rl.RPOLossFn(RPO("bwd_kl", beta=0.3))
    assert loss_fn.loss_type.value == "sequence_level" and loss_fn.input_type.value == "logprob"
    loss, metrics = loss_fn(
        next_token_logprobs=logps, data=data, global_valid_seqs=torch.tensor(10.0), global_valid_toks=None
    )
    labels = torch.where(data["token_mask"][:, 1:] > 0, 0, -100)
    reference = data["reference_policy_logprobs"][:, :-1]
    whole = preference_loss(logps, labels, data["rewards"], ref_logps=reference, objective=loss_fn.objective)
    expected = (whole.group_losses[0] + whole.group_losses[2]) / 5  # the middle pair is masked out
    same(loss, expected, logps)
    assert metrics["num_valid_samples"] == 2 and metrics["loss"] == pytest.approx(expected.item())
    names = ["loss", "sft_loss", "preference_loss", "accuracy", "rewards_chosen_mean", "rewards_rejected_mean"]
    assert list(metrics) == [*names, "num_valid_samples"] and all(isinstance(x, float) for x in metrics.values())


def test_nemo_rl_with_dpo_is_its_own_dpo(nemo_rl):
    """Against NeMo-RL's DPO by hand: log-sigmoid of the difference of log-ratios, first minus second of each pair."""
    logps, data = nemo_batch()
    del data["rewards"]
    mask = data["token_mask"][:, 1:]
    diff = ((logps - data["reference_policy_logprobs"][:, :-1]) * mask).sum(-1)
    valid = data["sample_mask"][::2]
    chosen, rejected = diff[::2], diff[1::2]
    dpo = -(torch.nn.functional.logsigmoid(0.2 * (chosen - rejected)) * valid).sum() / 2
    sft = -((logps * mask).sum(-1)[::2] * valid).sum() / 2
    loss, metrics = nemo_rl.RPOLossFn(DPO(beta=0.2), sft_loss_weight=0.1)(logps, data, torch.tensor(4.0))
    same(loss, dpo + 0.1 * sft, logps)
    for name, value in [
        ("preference_loss", dpo),
        ("sft_loss", sft),
        ("accuracy", ((chosen > rejected) * valid).sum() / 2),
        ("rewards_chosen_mean", (chosen * valid).sum() / 2),
        ("rewards_rejected_mean", (rejected * valid).sum() / 2),
    ]:
        assert metrics[name] == pytest.approx(value.item(), rel=1e-5), name


def test_nemo_rl_says_what_is_missing(nemo_rl):
    logps, data = nemo_batch()
    with pytest.raises(ValueError, match=r"rewards must have the shape of sample_mask, \[6\]; got \[4\]"):
        nemo_rl.RPOLossFn()(logps, dict(data, rewards=data["rewards"][:4]), torch.tensor(4.0))
    del data["rewards"]
    with pytest.raises(ValueError, match="the objective needs rewards, and the batch has none"):
        nemo_rl.RPOLossFn()(logps, data, torch.tensor(4.0))
    del data["reference_policy_logprobs"]
    assert nemo_rl.RPOLossFn(SimPO())(logps, data, torch.tensor(4.0))[0].isfinite()


def test_nemo_rl_rewards_reach_the_batch(nemo_rl, install):
    def preference_preprocessor(datum_dict, task_data_spec, tokenizer, max_seq_length, idx):
        better, worse = sorted(datum_dict["completions"], key=lambda c: c["rank"])
        return {"message_log_chosen": better["completion"], "message_log_rejected": worse["completion"], "idx": idx}

    def preference_collate_fn(data_batch, tokenizer, make_sequence_length_divisible_by, add_loss_mask):
        return {"logs": [datum[f"message_log_{side}"] for datum in data_batch for side in ("chosen", "rejected")]}

    processors = install("nemo_rl.data.processors", preference_preprocessor=preference_preprocessor)
    collate = install("nemo_rl.data.collate_fn", preference_collate_fn=preference_collate_fn)
    dpo = install("nemo_rl.algorithms.dpo", preference_collate_fn=preference_collate_fn)  # imported by name
    data = [
        [dict(rank=1, completion="b", reward=-1.5), dict(rank=0, completion="a", reward=2.0)],
        [dict(rank=0, completion="c", reward=0.5), dict(rank=1, completion="d", reward=0.25)],
    ]
    with nemo_rl.carry_rewards(), nemo_rl.carry_rewards():
        rows = [processors.preference_preprocessor({"completions": c}, None, None, 8, i) for i, c in enumerate(data)]
        batch = dpo.preference_collate_fn(rows, tokenizer=None, make_sequence_length_divisible_by=1, add_loss_mask=True)
        assert batch["logs"] == ["a", "b", "c", "d"] and batch["rewards"].tolist() == [2.0, -1.5, 0.5, 0.25]
        with pytest.raises(ValueError, match='each completion must have a "reward"'):
            processors.preference_preprocessor({"completions": [dict(rank=0, completion="a")]}, None, None, 8, 0)
    assert dpo.preference_collate_fn is collate.preference_collate_fn is preference_collate_fn
