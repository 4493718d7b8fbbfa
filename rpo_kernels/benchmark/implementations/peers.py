"""Other libraries' loss layers, called as in their own trainers or documentation."""

import torch
from torch import Tensor

from ..inputs import Inputs
from ..problem import BETA, Problem
from .registry import Run, Unavailable, implementation

_TRL_COLUMNS = 32768  # vocabulary columns a tile, TRL's own setting


@implementation("TRL selective_log_softmax", "logits", package="trl", head_name="TRL selective_log_softmax")
def _(problem: Problem) -> Run:
    from trl.trainer.utils import selective_log_softmax

    return lambda x: x.loss(selective_log_softmax(x.transformed(x.logits), x.labels))


@implementation("TRL chunked log-probs", "head", package="trl")
def _(problem: Problem) -> Run:
    from trl.kernels import ChunkedLogProbFunction

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        rows = (x.hidden.flatten(0, 1), x.weight, None, x.labels.flatten())
        logps, *_ = ChunkedLogProbFunction.apply(*rows, 1.0, _TRL_COLUMNS, problem.softcap, problem.logit_scale, ())
        return x.loss(logps)

    return run


@implementation("Liger cross-entropy", "logits", package="liger-kernel", device="cuda", inplace=True)
def _(problem: Problem) -> Run:
    from liger_kernel.transformers.functional import liger_cross_entropy

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        logits = x.logits * problem.logit_scale if problem.logit_scale != 1 else x.logits
        options = dict(reduction="none", softcap=problem.softcap)
        return x.loss(-liger_cross_entropy(logits.flatten(0, 1), x.labels.flatten(), **options).float())

    return run


@implementation("Liger fused linear DPO", "head", package="liger-kernel")
def _(problem: Problem) -> Run:
    if problem.responses != 2:
        raise Unavailable("takes pairs only (K = 2)")
    _refuse_transforms(problem)
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    fused = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        loss, results = fused(x.weight, x.hidden, x.labels)
        return loss.squeeze(), torch.cat([results[0], results[1]])

    return run


@implementation("cut-cross-entropy", "head", package="cut-cross-entropy", device="cuda", approximate=True)
def _(problem: Problem) -> Run:
    return _cut_cross_entropy(problem, impl="cce")


@implementation("cut-cross-entropy unfiltered", "head", package="cut-cross-entropy", device="cuda")
def _(problem: Problem) -> Run:
    return _cut_cross_entropy(problem, impl="cce", filter_eps=None)


@implementation("cut-cross-entropy torch_compile", "head", package="cut-cross-entropy")
def _(problem: Problem) -> Run:
    return _cut_cross_entropy(problem, impl="torch_compile")


@implementation("QuACK cross-entropy", "logits", package="quack-kernels", device="cuda")
def _(problem: Problem) -> Run:
    return _quack(problem)


@implementation("QuACK cross-entropy in place", "logits", package="quack-kernels", device="cuda", inplace=True)
def _(problem: Problem) -> Run:
    return _quack(problem, inplace_backward=True)


def _cut_cross_entropy(problem: Problem, **options) -> Run:
    from cut_cross_entropy import linear_cross_entropy

    def run(x: Inputs) -> tuple[Tensor, Tensor]:
        hidden = x.hidden * problem.logit_scale if problem.logit_scale != 1 else x.hidden
        keywords = dict(reduction="none", softcap=problem.softcap, **options)
        return x.loss(-linear_cross_entropy(hidden, x.weight, x.labels, **keywords).float())

    return run


def _quack(problem: Problem, **options) -> Run:
    _refuse_transforms(problem)
    from quack.cross_entropy import cross_entropy

    keywords = dict(reduction="none", **options)
    return lambda x: x.loss(-cross_entropy(x.logits.flatten(0, 1), x.labels.flatten(), **keywords))


def _refuse_transforms(problem: Problem) -> None:
    if problem.softcap is not None:
        raise Unavailable("has no softcap")
    if problem.logit_scale != 1:
        raise Unavailable("has no logit scale")
