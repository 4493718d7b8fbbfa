"""Predicted memory of the loss layer of a training step, by the planner, and the largest sizes that fit a card."""

from collections.abc import Callable
from typing import NamedTuple

from .models import Model
from .problem import Problem

# Bytes a parameter of the whole model: frozen in half precision (LoRA; the adapters are small), or mixed-precision Adam
# (half-precision weights and gradients; float32 weights and two moments).
BYTES_PER_PARAMETER = {"lora": 2, "full": 16}
EAGER = "eager torch"


class Prediction(NamedTuple):
    """Bytes at the peak of a training pass of the loss layer."""

    weight: int  # the LM head's
    hidden: int  # the hidden states
    gradients: int
    work: int  # logits and all else

    @property
    def extra(self) -> int:
        """Beyond the inputs."""
        return self.gradients + self.work

    @property
    def total(self) -> int:
        return sum(self)


def predict(problem: Problem, budget: int | str | None) -> Prediction:
    """This package's loss from hidden states within a memory budget, from the planner."""
    from ..head.plan import memory_plan

    plan = memory_plan(
        problem.rows, problem.hidden, problem.vocab, problem.torch_dtype,
        needs_weight="weight" in problem.kind.gradients, needs_hidden="hidden" in problem.kind.gradients,
        memory_budget=budget, softcap=problem.softcap, device=problem.device, backend=_backend(problem),
    )  # fmt: skip
    backward = plan.backward_bytes + plan.gradient_bytes
    # Where tiles are kept in its memory, forward allocates the weight's gradient.
    early = problem.vocab * problem.hidden * problem.torch_dtype.itemsize if plan.shared.tiles else 0
    forward = plan.forward_bytes + early
    gradients = plan.gradient_bytes if backward >= forward else early
    return Prediction(*_inputs(problem), gradients, max(backward, forward) - gradients)


def _backend(problem: Problem) -> str | None:
    """ "torch" if it is what will run: it makes copies of a tile. Of a GPU that is not here Triton is assumed."""
    import torch

    from ..kernels import dispatch

    if problem.device == "cuda" and not torch.cuda.is_available():
        return None
    probe = torch.empty(0, dtype=problem.torch_dtype, device=problem.device)
    return "torch" if dispatch.choose(probe, None) == "torch" else None


def predict_eager(problem: Problem) -> Prediction:
    """Plain torch, `(hidden @ weight.T).float().log_softmax(-1).gather(...)`: backward holds the log-probabilities,
    the gather's gradient and the log-softmax's, 12 bytes a logit; a softcap keeps its tanh as well. On a CPU a
    half-precision gradient of the weight comes from a float32 one."""
    logits = problem.rows * problem.vocab
    trained = "weight" in problem.kind.gradients
    softmax = logits * (12 + (problem.itemsize if problem.softcap else 0))
    weight, hidden = _inputs(problem)
    gradients = hidden + weight * trained
    products = logits * problem.itemsize
    if problem.device == "cpu" and problem.itemsize == 2 and trained:
        products += 4 * problem.vocab * problem.hidden
    if softmax >= products + gradients:
        return Prediction(weight, hidden, 0, softmax)
    return Prediction(weight, hidden, gradients, products)


def _inputs(problem: Problem) -> tuple[int, int]:
    return problem.vocab * problem.hidden * problem.itemsize, problem.rows * problem.hidden * problem.itemsize


# Largest sizes that fit a card ---------------------------------------------------------------------------------------


class Cards(NamedTuple):
    """What there is to train on: parameters, gradients and optimizer are sharded evenly over all cards (ZeRO 3, FSDP),
    the loss layer's weight is whole on each."""

    size: int  # bytes of one card
    number: int = 1


class Prompts(NamedTuple):
    """The prompts of a step: of how many tokens, and whether each is computed once for its responses."""

    length: int = 0
    shared: bool = False

    def tokens(self, problem: Problem) -> int:
        """Tokens that the layers compute for the problem's responses, which are of one length."""
        copies = problem.sequences // problem.responses if self.shared else problem.sequences
        return copies * self.length + problem.rows


def rest_of_training(model: Model, training: str, tokens: int, cards: int) -> int:
    """Bytes a card of everything but the loss layer: parameters and optimizer, and with gradient checkpointing one
    half-precision hidden state a layer and token."""
    parameters = int(model.parameters * 1e9)
    if cards == 1:
        parameters -= model.hidden * model.vocab  # the LM head's weight is the loss layer's
    head_optimizer = 12 * model.vocab * model.hidden * (training == "full" and cards == 1)
    states = tokens * model.layers * model.hidden * 2
    return parameters * BYTES_PER_PARAMETER[training] // cards + head_optimizer + states


def fits(problem: Problem, model: Model, training: str, cards: Cards, ours: bool, prompts: Prompts = Prompts()) -> bool:
    """Whether a step with these responses fits; this package's budget is what the rest leaves."""
    rest = rest_of_training(model, training, prompts.tokens(problem), cards.number)
    if not ours:
        return rest + predict_eager(problem).total <= cards.size
    fixed = rest + sum(_inputs(problem)) + problem.rows * problem.hidden * problem.itemsize
    return rest + predict(problem, max(0, cards.size - fixed)).total <= cards.size


def largest(fitting: Callable[[int], bool]) -> int:
    """The largest n >= 0 with `fitting(n)`, which holds below some bound and not above it."""
    high = 1
    while high < 2**24 and fitting(high):
        high *= 2
    low, step = 0, high
    while step := step // 2:
        if fitting(low + step):
            low += step
    return low


def largest_fitting_lines(problem: Problem, model: Model, cards: Cards, prompt_length: int = 0) -> list[list[str]]:
    """Rows of the table of the largest sizes that fit, for one prompt: response length at this K, K at this length."""
    separate, shared = Prompts(prompt_length), Prompts(prompt_length, shared=True)
    ways = [(EAGER, False, separate), ("rpo_kernels", True, separate)]
    if prompt_length:
        ways.append(("shared prompts", True, shared))
    lines = []
    for training in BYTES_PER_PARAMETER:
        problem = problem._replace(case="head-frozen" if training == "lora" else "head", device="cuda")
        for name, ours, prompts in ways:
            rest = (model, training, cards, ours, prompts)

            def longer(n: int, problem: Problem = problem, rest: tuple = rest) -> bool:
                return fits(problem._replace(length=n), *rest)

            def wider(n: int, problem: Problem = problem, rest: tuple = rest) -> bool:
                return fits(problem._replace(sequences=n, responses=n), *rest)

            length, responses = largest(longer), largest(wider)
            shown = [f"{length:,} tokens", f"{responses:,}"] if length else ["does not fit", "does not fit"]
            lines.append([training, name, *shown])
    return lines
