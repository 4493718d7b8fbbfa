"""Integrations against the trainers' own code, where it is installed; test_integration_contracts.py runs everywhere.

Needs no whole trainer, only what the module named imports: `pip install --no-deps` of openrlhf, llamafactory, ms-swift
and axolotl, NeMo-RL from its repository, then what is missing. Tried with OpenRLHF 0.11.2, LLaMA-Factory 0.9.5,
ms-swift 4.6.0, axolotl 0.19.0 and NeMo-RL 7ea279ab (with transformers 5.11, which it asks for).
"""

import importlib
import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from rpo_kernels import DPO

pytestmark = pytest.mark.slow
VOCAB = 211


@pytest.fixture
def real(monkeypatch):
    """A function that imports a trainer's module; skips without it.

    The packages in `bare` are not initialised: they ask for libraries that need a GPU, or for one version of them.
    """

    def load(name, bare=()):
        package = name.split(".")[0]
        found = importlib.util.find_spec(package)
        if found is None:
            pytest.skip(f"{package} is not installed")
        for path in bare:
            module = types.ModuleType(path)
            inner = path.split(".")[1:]
            module.__path__ = [str(Path(place, *inner)) for place in found.submodule_search_locations]
            monkeypatch.setitem(sys.modules, path, module)
        return pytest.importorskip(name, exc_type=ImportError)

    return load


def make(shape=(4, 9), dtype=torch.float32):
    """Logits, and labels of which some are not scored."""
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, VOCAB, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(VOCAB, shape, generator=generator)
    labels[:, :3] = -100
    labels[1, 6:] = labels[2, 7:] = -100
    return logits, labels


def compare(own, patch, logits, tolerance=1e-5):
    """Results of `own()`, and gradients of a weighted sum of them, without and with the patch."""
    runs = []
    for patched in (False, True):
        if patched:
            with patch():
                results = own()
        else:
            results = own()
        results = results if isinstance(results, tuple) else (results,)
        loss = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape)).sum() for x in results if x.requires_grad)
        runs.append((*[x.detach().float() for x in results], torch.autograd.grad(loss, logits)[0].float()))
    for theirs, ours in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_openrlhf(real, dtype):
    utils = real("openrlhf.models.utils", bare=["openrlhf.models"])
    from rpo_kernels.integrations.openrlhf import patch

    logits, labels = make(dtype=dtype)
    labels = labels.clamp(min=0)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2

    def own():
        logps = utils.log_probs_from_logits(logits.clone(), labels, temperature=0.8)  # it scales the logits in place
        return logps, utils.compute_entropy(logits)

    compare(own, patch, logits, tolerance)


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
def test_llama_factory(real, ld_alpha, monkeypatch):
    monkeypatch.setenv("DISABLE_VERSION_CHECK", "1")
    trainer_utils = real("llamafactory.train.trainer_utils")
    from rpo_kernels.integrations.llama_factory import patch

    logits, labels = make()
    compare(lambda: trainer_utils.get_batch_logps(logits.clone(), labels, ld_alpha=ld_alpha), patch, logits)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ms_swift(real, reduction):
    mixin = real("swift.rlhf_trainers.rlhf_mixin").RLHFTrainerMixin
    from rpo_kernels.integrations.ms_swift import patch

    trainer = object.__new__(mixin)
    trainer.template = types.SimpleNamespace(sequence_parallel_size=1)
    logits, labels = make()

    def own():
        logps, reduced, scored = trainer.get_per_token_logps(logits, labels, reduction=reduction)
        return logps, reduced.detach(), scored

    compare(own, patch, logits, 1e-4)


def test_axolotl(real):
    base = real("axolotl.integrations.base")
    kernels = real("axolotl.monkeypatch.trainer.utils")
    import trl.trainer.utils as utils

    from rpo_kernels.integrations.trl import patch

    own = utils.selective_log_softmax
    manager = base.PluginManager.get_instance()
    manager.register("rpo_kernels.integrations.axolotl.RPOKernelsPlugin")
    (plugin,) = manager.plugins.values()
    assert manager.get_input_args() == ["rpo_kernels.integrations.axolotl.RPOKernelsArgs"]
    cfg = base.DictDefault(rl="dpo", rpo_kernels_memory_budget="64MB")
    try:
        plugin.register(cfg)
        ours = utils.selective_log_softmax
        assert ours is not own
        utils.selective_log_softmax = kernels.selective_log_softmax  # as its patch manager does
        manager.pre_model_load(cfg)
        assert utils.selective_log_softmax == ours
    finally:
        patch().undo()
        manager.plugins.clear()


# NeMo-RL

BARE = ["nemo_rl.algorithms.loss"]


def test_nemo_rl_rewards_reach_its_batches(real):
    processors, collate = real("nemo_rl.data.processors"), real("nemo_rl.data.collate_fn")
    real("nemo_rl.algorithms.loss.interfaces", bare=BARE)
    interfaces = real("nemo_rl.data.interfaces")
    from rpo_kernels.integrations.nemo_rl import carry_rewards
    from trl_trainers import tokenizer as make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

    def completion(rank, text, reward):
        return dict(rank=rank, completion=[dict(role="assistant", content=text)], reward=reward)

    data = [
        dict(
            context=[dict(role="user", content="one")], completions=[completion(1, "b", -1.5), completion(0, "a", 2.0)]
        ),
        dict(
            context=[dict(role="user", content="two")], completions=[completion(0, "c", 0.5), completion(1, "d", 0.0)]
        ),
    ]
    spec = interfaces.TaskDataSpec(task_name="preference")
    with carry_rewards():
        rows = [processors.preference_preprocessor(datum, spec, tokenizer, 64, i) for i, datum in enumerate(data)]
        batch = collate.preference_collate_fn(rows, tokenizer, 1, add_loss_mask=True)
    assert batch["rewards"].tolist() == [2.0, -1.5, 0.5, 0.0]
    assert batch["input_ids"].shape[0] == batch["token_mask"].shape[0] == 4
    assert torch.equal(batch.slice(2, 4)["rewards"], torch.tensor([0.5, 0.0]))  # as it shards them over processes


def test_nemo_rl_dpo_is_its_own(real):
    functions = real("nemo_rl.algorithms.loss.loss_functions", bare=BARE)
    from rpo_kernels.integrations.nemo_rl import RPOLossFn

    generator = torch.Generator().manual_seed(0)
    logps = (-torch.rand(6, 8, generator=generator)).requires_grad_()
    data = functions.BatchedDataDict(
        input_ids=torch.ones(6, 9, dtype=torch.int64),
        token_mask=(torch.rand(6, 9, generator=generator) > 0.3).long(),
        reference_policy_logprobs=-torch.rand(6, 9, generator=generator),
        sample_mask=torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0]),
    )
    settings = functions.DPOLossConfig(
        reference_policy_kl_penalty=0.2,
        preference_loss_weight=1.0,
        sft_loss_weight=0.1,
        preference_average_log_probs=False,
        sft_average_log_probs=False,
    )
    seqs, toks = torch.tensor(4.0), data["token_mask"].sum()
    theirs = functions.DPOLossFn(settings)
    ours = RPOLossFn(DPO(beta=0.2), sft_loss_weight=0.1)
    assert (ours.loss_type, ours.input_type) == (theirs.loss_type, theirs.input_type)
    results = [loss_fn(logps, data, seqs, toks) for loss_fn in (ours, theirs)]
    torch.testing.assert_close(results[0][0], results[1][0])
    grads = [torch.autograd.grad(loss, logps)[0] for loss, _ in results]
    torch.testing.assert_close(*grads)
    assert results[0][1].keys() == results[1][1].keys()
    for name, value in results[1][1].items():
        assert results[0][1][name] == pytest.approx(float(value), rel=1e-5), name
