"""TRL's functions of the loss layer, replaced by this package's operators.

There are two generations of them, recognised by the contents of `trl.trainer.utils`:

    from 1.15   `_ChunkedLogProbFunction`, called by the fused LM head of DPO, KTO, SFT, GRPO and RLOO
    all         `selective_log_softmax` and `entropy_from_logits` on logits, which experimental trainers still use

Trainers import the latter by name, so they are replaced in all loaded modules; modules imported later get the new ones.
"""

import contextlib
import inspect
import math
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor

from ...head import linear_token_logprobs
from ...logprobs import token_logprobs
from .entropy import differentiable_entropy

_HEAD = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale")
# Read in TRL 0.24, 1.9, 1.13, 1.14, 1.15 and 1.16.
KNOWN_SIGNATURES: dict[str, list[tuple[str, ...]]] = {
    "selective_log_softmax": [("logits", "index"), ("logits", "index", "temperature", "row_mask")],
    "entropy_from_logits": [("logits", "chunk_size")],
    "selective_log_softmax_and_entropy": [("logits", "index", "entropy_requires_grad", "temperature", "row_mask")],
    "_ChunkedLogProbFunction": [("last_hidden", *_HEAD[1:]), (*_HEAD, "outputs")],
    "_use_triton": [("device",)],
}
REQUIRED = ("selective_log_softmax", "entropy_from_logits")
REQUIRED_OF_FUSED_HEAD = ("_ChunkedLogProbFunction", "_use_triton", "maybe_gather_lm_head_ctx")
# The head's outputs beside the log-probabilities, in TRL's order: its names and ours.
HEAD_OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
GradientFilter = float | Literal["auto"] | None
# Marks rows that are not scored; no label of TRL's has this value.
NOT_SCORED = -(2**31)

_active: "Patch | None" = None


def patch(memory_budget: int | str | None = None, gradient_filter: GradientFilter = None) -> "Patch":
    """Compute the loss layer of TRL's trainers with this package, from now on.

        import rpo_kernels.integrations.trl
        rpo_kernels.integrations.trl.patch()

    One call before training; trainers built before it change too. On the CPU only labelled rows are computed. Cases
    that are not covered (several labels per position, a logit scale that is not positive, tensor-parallel logits)
    call TRL's own function, with one warning.

    Args:
        memory_budget, gradient_filter: as in `linear_token_logprobs`, for the trainers with a fused LM head.

    Returns:
        A handle: `undo()` restores TRL's own functions, and so does leaving it as a context manager. A second `patch`
        before that changes the settings and returns the same handle.

    Raises:
        ImportError: if TRL is not installed.
        RuntimeError: if this version of TRL has functions of other names or signatures than those known here; nothing
            is changed then.
        ValueError: for a budget or a filter that `linear_token_logprobs` refuses.
    """
    global _active
    _check_settings(memory_budget, gradient_filter)
    if _active is None:
        _active = Patch(_trl_utils())
    _active.memory_budget, _active.gradient_filter = memory_budget, gradient_filter
    return _active


@contextlib.contextmanager
def patched(memory_budget: int | str | None, gradient_filter: GradientFilter) -> Iterator[None]:
    """`patch` for a block; afterwards TRL, or the settings of an earlier `patch`, are restored."""
    earlier = _active
    settings = None if earlier is None else (earlier.memory_budget, earlier.gradient_filter)
    handle = patch(memory_budget, gradient_filter)
    try:
        yield
    finally:
        if settings is None:
            handle.undo()
        else:
            handle.memory_budget, handle.gradient_filter = settings


class Patch:
    """TRL with its loss layer replaced, until `undo()`; made by `patch`."""

    def __init__(self, utils: ModuleType):
        _check_signatures(utils)
        self.memory_budget: int | str | None = None
        self.gradient_filter: GradientFilter = None
        self._utils = utils
        self._said: set[str] = set()
        self._own = {name: getattr(utils, name) for name in KNOWN_SIGNATURES if hasattr(utils, name)}
        new_signature = "row_mask" in _parameters(self._own["selective_log_softmax"])
        # TRL's kernels, which came with it, give float32 for half precision; before, trainers rely on the logits' type.
        self._rounds_results = not new_signature
        replacements = {
            "selective_log_softmax": self._selective_log_softmax,
            "entropy_from_logits": self._entropy_from_logits,
            "selective_log_softmax_and_entropy": self._selective_log_softmax_and_entropy,
            "_ChunkedLogProbFunction": SimpleNamespace(apply=self._fused_head),
            "_use_triton": self._compacts_rows,
        }
        self._replacements = {name: replacements[name] for name in self._own}
        _rebind(self._own, self._replacements)

    def undo(self) -> None:
        """Restore TRL's own functions; calling it again changes nothing."""
        global _active
        if _active is self:
            _rebind(self._replacements, self._own)
            _active = None

    def __enter__(self) -> "Patch":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    # -------------------------------------------------------------------------------------------- from hidden states

    def _compacts_rows(self, device: torch.device) -> bool:
        """Whether TRL's fused head skips rows without a label."""
        return device.type == "cpu" or self._own["_use_triton"](device)

    def _fused_head(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] | None = None,
    ) -> tuple[Tensor | None, ...]:
        own = self._own["_ChunkedLogProbFunction"]
        if not (logit_scale > 0 and math.isfinite(logit_scale)):
            self._say(f"log-probabilities of logits scaled by {logit_scale} are not covered")
            arguments = (hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale)
            return own.apply(*arguments, *([] if outputs is None else [outputs]))
        wanted = ("entropy",) if outputs is None else tuple(name for name in HEAD_OUTPUTS if name in outputs)
        dtype = _compute_dtype(hidden)
        operands = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

        options: dict[str, Any] = dict(
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            ignore_index=NOT_SCORED,
            memory_budget=self.memory_budget,
            gradient_filter=self.gradient_filter,
        )
        names = tuple(HEAD_OUTPUTS[name] for name in wanted)
        with self._gathered_in_backward(weight, bias):
            result: Any = linear_token_logprobs(
                operands[0], operands[1], targets, bias=operands[2], outputs=names, entropy_grad=False, **options
            )
            logps = result.logps if names else result
            values = {name: getattr(result, HEAD_OUTPUTS[name]) for name in wanted}
            if "entropy" in values:
                values["entropy"] = differentiable_entropy(values["entropy"], *operands, targets, options)
        if outputs is None:
            return logps, values["entropy"]
        if "is_top1" in values:
            values["is_top1"] = values["is_top1"].bool()
        return logps, *(values.get(name) for name in HEAD_OUTPUTS)

    @contextlib.contextmanager
    def _gathered_in_backward(self, *parameters: Tensor | None) -> Iterator[None]:
        """Under ZeRO-3 a parameter is whole only while TRL gathers it: save itself, and gather it again in backward."""
        gather = getattr(self._utils, "maybe_gather_lm_head_ctx", None)
        partitioned = [p for p in parameters if p is not None and hasattr(p, "ds_id")]
        if gather is None or not partitioned:
            yield
            return

        def pack(x: Tensor) -> tuple[bool, Tensor]:
            same = [p for p in partitioned if p.data_ptr() == x.data_ptr() and p.shape == x.shape]
            return (True, same[0]) if same else (False, x)

        def unpack(packed: tuple[bool, Tensor]) -> Tensor:
            is_parameter, x = packed
            if not is_parameter:
                return x
            with gather(x):
                return x.data  # keeps the gathered memory while backward reads it

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield

    # --------------------------------------------------------------------------------------------------- from logits

    def _selective_log_softmax(
        self, logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
    ) -> Tensor:
        if not self._covers(logits, index):
            options = () if self._rounds_results else (temperature, row_mask)
            return self._own["selective_log_softmax"](logits, index, *options)
        logps = token_logprobs(logits, _scored(index, row_mask), temperature=temperature, ignore_index=NOT_SCORED)
        return self._writable(logps, logits)

    def _entropy_from_logits(self, logits: Tensor, chunk_size: int = 128) -> Tensor:
        labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        if not self._covers(logits, labels):
            return self._own["entropy_from_logits"](logits, chunk_size)
        result: Any = token_logprobs(logits, labels, outputs=("entropy",))
        return self._writable(result.entropy, logits)

    def _selective_log_softmax_and_entropy(
        self,
        logits: Tensor,
        index: Tensor,
        entropy_requires_grad: bool = True,
        temperature: float = 1.0,
        row_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        if not self._covers(logits, index):
            own = self._own["selective_log_softmax_and_entropy"]
            return own(logits, index, entropy_requires_grad, temperature, row_mask)
        labels = _scored(index, row_mask)
        result: Any = token_logprobs(
            logits, labels, temperature=temperature, ignore_index=NOT_SCORED, outputs=("entropy",)
        )
        logps, entropy = self._writable(result.logps, logits), self._writable(result.entropy, logits)
        return logps, entropy if entropy_requires_grad else entropy.detach()

    def _covers(self, logits: Tensor, index: Tensor) -> bool:
        if hasattr(logits, "device_mesh"):
            self._say("tensor-parallel logits are not covered")
        elif index.ndim == 0 or index.shape != logits.shape[:-1]:
            self._say("labels of another shape than the logits without their vocabulary are not covered")
        else:
            return True
        return False

    def _writable(self, values: Tensor, logits: Tensor) -> Tensor:
        """A copy, because trainers write zeros into it at unscored positions; in the dtype that they rely on."""
        return values.to(logits.dtype if self._rounds_results else values.dtype, copy=True)

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warnings.warn(f"rpo_kernels: {what}; TRL's own function computes them", stacklevel=4)


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _scored(index: Tensor, row_mask: Tensor | None) -> Tensor:
    return index if row_mask is None else torch.where(row_mask == 0, NOT_SCORED, index)


def _check_settings(memory_budget: int | str | None, gradient_filter: GradientFilter) -> None:
    one = torch.zeros(1, 1)
    labels = torch.zeros(1, dtype=torch.int64)
    linear_token_logprobs(one, one, labels, memory_budget=memory_budget, gradient_filter=gradient_filter)


def _trl_utils() -> ModuleType:
    try:
        import trl.trainer.utils
    except ImportError as error:
        raise ImportError("rpo_kernels.integrations.trl needs TRL: pip install 'trl>=0.24'") from error
    return trl.trainer.utils


def _parameters(function: Any) -> tuple[str, ...]:
    if inspect.isclass(function):  # an autograd.Function
        return tuple(inspect.signature(function.forward).parameters)[1:]  # type: ignore[attr-defined]
    return tuple(inspect.signature(function).parameters)


def _check_signatures(utils: ModuleType) -> None:
    import trl

    required = REQUIRED + (REQUIRED_OF_FUSED_HEAD if hasattr(utils, "add_fused_lm_head") else ())
    missing = [name for name in required if not hasattr(utils, name)]
    if missing:
        raise RuntimeError(
            f"TRL {trl.__version__} is not a version that rpo_kernels knows: trl.trainer.utils has no {missing}"
        )
    for name, known in KNOWN_SIGNATURES.items():
        if hasattr(utils, name) and _parameters(getattr(utils, name)) not in known:
            raise RuntimeError(
                f"TRL {trl.__version__} is not a version that rpo_kernels knows: {name} takes "
                f"{_parameters(getattr(utils, name))}, where one of {known} was expected"
            )


def _rebind(old: dict[str, Any], new: dict[str, Any]) -> None:
    """Rebind the names of the old functions to the new ones in every loaded module of TRL."""
    for module_name, module in list(sys.modules.items()):
        if module_name == "trl" or module_name.startswith("trl."):
            for name, value in old.items():
                if vars(module).get(name) is value:
                    setattr(module, name, new[name])
