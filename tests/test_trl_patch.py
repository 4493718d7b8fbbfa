"""TRL with its loss layer replaced: its functions one by one, and its trainers step by step, against TRL's own.

Runs with TRL 1.15 or later and with 0.24 (see test_trl_024.py); what a generation does not have is skipped.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

import trl.trainer.utils as utils  # noqa: E402

from rpo_kernels import linear_token_logprobs  # noqa: E402
from rpo_kernels.integrations.trl import patch, patching  # noqa: E402
from rpo_kernels.integrations.trl.entropy import differentiable_entropy  # noqa: E402
from trl_trainers import GENERATION, MODELS, assert_same, train  # noqa: E402

fused = pytest.mark.skipif(GENERATION != "fused head", reason=f"TRL {trl.__version__} has no fused LM head")
ROOT = Path(__file__).parents[1]
OUTPUTS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs")
LOSSES = [
    dict(loss_type=["sigmoid"]),
    dict(loss_type=["hinge"]),
    dict(loss_type=["ipo"]),
    dict(loss_type=["exo_pair"], label_smoothing=1e-3),
    dict(loss_type=["nca_pair"]),
    dict(loss_type=["robust"], label_smoothing=0.1),
    dict(loss_type=["bco_pair"]),
    dict(loss_type=["sppo_hard"]),
    dict(loss_type=["aot"]),
    dict(loss_type=["aot_unpaired"]),
    dict(loss_type=["apo_zero"]),
    dict(loss_type=["apo_down"]),
    dict(loss_type=["discopop"]),
    dict(loss_type=["sft"]),
    dict(loss_type=["sigmoid_norm"]),
    dict(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]),
    dict(f_divergence_type="forward_kl"),
    dict(f_divergence_type="js_divergence"),
    dict(f_divergence_type="alpha_divergence"),
    dict(ld_alpha=0.5),
    dict(use_weighting=True),
    dict(precompute_ref_log_probs=True),
]


@pytest.fixture(autouse=True)
def unpatched():
    """Every test starts from, and leaves, TRL as it is."""
    assert patching._active is None
    yield
    if patching._active is not None:
        patching._active.undo()


# ------------------------------------------------------------------------------------------------------------- handle


def names_of_trl():
    """Every name of a loaded module of TRL, and what it stands for."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "trl"}
    return {(m, name): id(value) for m, module in modules.items() for name, value in vars(module).items()}


def test_undo_puts_everything_back():
    import trl.trainer.dpo_trainer  # noqa: F401

    before = names_of_trl()
    handle = patch()
    changed = {name for name, value in names_of_trl().items() if before.get(name) != value}
    assert ("trl.trainer.utils", "selective_log_softmax") in changed and (
        "trl.trainer.utils",
        "entropy_from_logits",
    ) in changed
    handle.undo()
    handle.undo()
    after = names_of_trl()
    assert {name: after[name] for name in before} == before


def test_a_second_patch_changes_the_settings_of_the_first():
    handle = patch()
    names = names_of_trl()
    assert patch(memory_budget="1MB", gradient_filter=2**-16) is handle and names_of_trl() == names
    assert (handle.memory_budget, handle.gradient_filter) == ("1MB", 2**-16)


def test_a_context_manager_patches_for_its_block():
    own = utils.selective_log_softmax
    with patch():
        assert utils.selective_log_softmax is not own
    assert utils.selective_log_softmax is own


def test_modules_loaded_before_and_while_patched_are_put_back():
    name = "trl.trainer.dpo_trainer" if GENERATION == "logits" else "trl.experimental.cpo.cpo_trainer"
    sys.modules.pop(name, None)
    own = utils.selective_log_softmax
    with patch():
        module = __import__(name, fromlist=["x"])
        assert module.selective_log_softmax is utils.selective_log_softmax is not own
    assert module.selective_log_softmax is own
    with patch():
        assert module.selective_log_softmax is utils.selective_log_softmax is not own


def test_settings_are_checked_at_once():
    for settings in (dict(memory_budget="many"), dict(gradient_filter=-1.0)):
        with pytest.raises(ValueError, match=next(iter(settings))):
            patch(**settings)
    assert patching._active is None


def test_an_unknown_signature_is_refused(monkeypatch):
    monkeypatch.setattr(utils, "selective_log_softmax", lambda logits, ids: None)
    with pytest.raises(RuntimeError, match=r"selective_log_softmax takes \('logits', 'ids'\)"):
        patch()
    monkeypatch.delattr(utils, "selective_log_softmax")
    with pytest.raises(RuntimeError, match="has no"):
        patch()
    assert patching._active is None


@pytest.mark.slow
def test_a_script_of_trl_runs_patched(tmp_path):
    """`python -m rpo_kernels.integrations.trl MODULE`: the module is the program, with its arguments."""
    program = "print('patched', utils.selective_log_softmax.__module__, __name__, sys.argv[1:])"
    (tmp_path / "script.py").write_text(f"import sys\nimport trl.trainer.utils as utils\n{program}\n")
    command = [sys.executable, "-m", "rpo_kernels.integrations.trl", "script", "--bf16", "false"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = "patched rpo_kernels.integrations.trl.patching __main__ ['--bf16', 'false']"
    assert done.stdout.splitlines()[-1:] == [expected], done.stderr


# ---------------------------------------------------------------------------------------------------------- functions


def head_inputs(dtype=torch.float32, rows=7, bias=True):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).mul_(0.5).to(dtype).requires_grad_()
    offset = torch.randn(50, generator=generator).to(dtype).requires_grad_() if bias else None
    return hidden, weight, offset, torch.randint(0, 50, (rows,), generator=generator)


def head(inputs, temperature=1.0, softcap=None, scale=1.0, outputs=OUTPUTS):
    """All outputs, and the gradients of a loss of log-probabilities and entropies."""
    results = utils._ChunkedLogProbFunction.apply(*inputs, temperature, 32, softcap, scale, outputs)
    logps, entropy = results[:2]
    loss = (logps * torch.arange(1.0, len(logps) + 1)).sum()
    if entropy is not None:
        loss = loss + 0.3 * entropy.square().sum()
    loss.backward()
    gradients = [x.grad for x in inputs[:3] if x is not None]
    for x in inputs[:3]:
        if x is not None:
            x.grad = None
    return results, gradients


@fused
@pytest.mark.parametrize("transform", [(1.0, None, 1.0), (0.7, 3.0, 1.4), (2.0, None, 0.25)], ids=str)
@pytest.mark.parametrize("outputs", [OUTPUTS, ("log_probs",), ("entropy", "is_top1")], ids=len)
def test_the_head_function(transform, outputs):
    inputs = head_inputs()
    expected, expected_gradients = head(inputs, *transform, outputs)
    with patch():
        results, gradients = head(inputs, *transform, outputs)
    assert [x is None for x in results] == [x is None for x in expected]
    torch.testing.assert_close(results, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


@fused
def test_the_head_function_at_a_tie():
    """The first of several largest logits is the prediction."""
    hidden = torch.ones(3, 4)
    weight = torch.tensor([1.0, 2.0, 2.0, 0.0])[:, None].expand(4, 4)
    with patch():
        *_, is_top1 = utils._ChunkedLogProbFunction.apply(
            hidden, weight, None, torch.tensor([1, 2, 0]), 1.0, 32, None, 1.0, OUTPUTS
        )
    assert is_top1.tolist() == [True, False, False]


@fused
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)], ids=str)
def test_the_head_function_in_half_precision(dtypes):
    """Computed in the hidden states' type whatever the weight's; gradients come in the operands' own types."""
    hidden, weight, bias, targets = head_inputs()
    inputs = [
        x.detach().to(d).requires_grad_() for x, d in zip((hidden, weight, bias), (dtypes[0], dtypes[1], dtypes[1]))
    ]
    expected, expected_gradients = head((*inputs, targets))
    with patch():
        results, gradients = head((*inputs, targets))
    torch.testing.assert_close(results[0], expected[0], rtol=2e-2, atol=2e-2)
    for mine, theirs in zip(gradients, expected_gradients):
        assert mine.dtype == theirs.dtype and (mine - theirs).norm() <= 2e-2 * theirs.norm()


@fused
def test_the_head_function_without_a_scored_row():
    """A micro-batch may have no label at all: it then gives zeros, and gradients that are 0 rather than none."""
    inputs = head_inputs(rows=0)
    with patch():
        results, gradients = head(inputs)
    assert all(x.shape == (0,) for x in results) and results[4].dtype == torch.bool
    assert [g.shape for g in gradients] == [x.shape for x in inputs[:3]] and not any(g.any() for g in gradients)


@fused
def test_a_scale_that_is_not_positive_stays_trls_own():
    inputs = head_inputs()
    expected, _ = head(inputs, scale=-0.5)
    with patch(), pytest.warns(UserWarning, match="TRL's own") as record:
        results, _ = head(inputs, scale=-0.5)
        head(inputs, scale=-0.5)
    assert len(record) == 1 and torch.equal(results[0], expected[0])


@fused
def test_only_labelled_rows_are_computed(monkeypatch):
    """The operator gets as many rows as there are labels, on the CPU too."""
    from trl_trainers import model

    rows = []
    own = patching.linear_token_logprobs
    monkeypatch.setattr(patching, "linear_token_logprobs", lambda h, *a, **k: rows.append(len(h)) or own(h, *a, **k))
    policy = model()
    utils.add_fused_lm_head(policy)
    labels = torch.full((2, 9), -100)
    labels[:, 6:] = 5
    with patch():
        rows.clear()
        output = policy(torch.ones(2, 9, dtype=torch.int64), labels=labels, fused_lm_head=True)
    assert rows == [6] and output.log_probs.ne(0).sum() == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_logits_functions(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 40, generator=generator).mul_(3).to(dtype)[:, :-1].requires_grad_()
    index = torch.randint(0, 40, (2, 4), generator=generator)

    def results():
        logps, entropy = utils.selective_log_softmax(logits, index), utils.entropy_from_logits(logits)
        (gradient,) = torch.autograd.grad((logps * 2).sum() + entropy.square().sum(), logits)
        with torch.no_grad():
            logps[:, 0] = 0  # as trainers do
        return logps, entropy, gradient

    expected = results()
    with patch():
        mine = results()
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
    for x, y in zip(mine, expected):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, check_dtype=False)
    # As TRL's own kernels do, where it has them, half precision gives float32.
    results = dtype if GENERATION == "logits" else torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in mine] == [results, results, dtype]


@fused
def test_temperature_and_row_mask():
    logits = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 40, (2, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    expected = utils.selective_log_softmax_and_entropy(logits, index, True, 0.7, mask)
    with patch():
        torch.testing.assert_close(utils.selective_log_softmax_and_entropy(logits, index, True, 0.7, mask), expected)
        torch.testing.assert_close(utils.selective_log_softmax(logits, index, 0.7, mask), expected[0])


@fused
def test_several_labels_a_position_stay_trls_own():
    logits, index = torch.randn(2, 5, 40), torch.randint(0, 40, (2, 5, 3))
    expected = utils.selective_log_softmax(logits, index)
    with patch(), pytest.warns(UserWarning, match="TRL's own") as record:
        for _ in range(2):
            assert torch.equal(utils.selective_log_softmax(logits, index), expected)
    assert len(record) == 1


# ----------------------------------------------------------------------------------------------------------- trainers


def compare(name, path, tolerance=1e-4, **settings):
    theirs = train(name, path / "theirs", patched=False, **settings)
    ours = train(name, path / "ours", patched=True, **settings)
    assert_same(ours, theirs, tolerance)


def lora(**options):
    return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO", "CPO"])
def test_a_trainer(name, tmp_path):
    compare(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RLOO", "ORPO"])
def test_another_trainer(name, tmp_path):
    compare(name, tmp_path)


@fused
@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_dpo_losses(loss, tmp_path):
    compare("DPO", tmp_path, **loss)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "tied"])
@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO"])
def test_other_heads(name, kind, tmp_path):
    compare(name, tmp_path, kind=kind)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, dict(modules_to_save=["lm_head"])], ids=["frozen head", "trained head"])
@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO", "RLOO", "CPO", "ORPO"])
def test_adapters(name, options, tmp_path):
    compare(name, tmp_path, kind="untied", peft_config=lora(**options))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "GRPO"])
def test_gradient_accumulation(name, tmp_path):
    compare(name, tmp_path, gradient_accumulation_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DPO", "KTO", "SFT", "CPO"])
def test_bfloat16_autocast(name, tmp_path):
    """TRL's head rounds logits to bfloat16 and this package's does not, so they agree to that."""
    compare(name, tmp_path, tolerance=3e-2, bf16=True, learning_rate=1e-4, steps=1)


@fused
@pytest.mark.slow
def test_an_entropy_bonus(tmp_path):
    """Minus a multiple of the entropy in GRPO's loss: its gradient goes through the head."""
    compare("GRPO", tmp_path, entropy_coef=0.1)


def test_the_entropy_is_differentiable_once():
    """A penalty on its gradient raises instead of leaving the entropy's part out."""
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    labels = torch.zeros(4, dtype=torch.int64)
    out = linear_token_logprobs(hidden, weight, labels, outputs=("entropy",), entropy_grad=False)
    entropy = differentiable_entropy(out.entropy, hidden, weight, None, labels, {})
    (gradient,) = torch.autograd.grad(entropy.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (gradient.square().sum() + hidden.square().sum()).backward()
