"""The tensors of a problem: random, or the hidden states of a model's responses to real prompts."""

import hashlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .problem import BETA, Problem

_MAX_TOKENS = 512  # of prompt and response, where a model reads them


class Inputs(NamedTuple):
    """`logits` `[B, T, V]` where a case starts from them; else `hidden` `[B, T, H]` and `weight` `[V, H]`.

    Rewards fall with the response's number, so that the first of each group is the best.
    """

    problem: Problem
    labels: Tensor  # [B, T]
    rewards: Tensor  # [B], stacked: all first responses, then all second ones
    grad_logps: Tensor  # [B, T], of the row kernels' case
    logits: Tensor = torch.empty(0)
    hidden: Tensor = torch.empty(0)
    weight: Tensor = torch.empty(0)

    @classmethod
    def make(cls, problem: Problem, states: Path | None = None) -> "Inputs":
        """The inputs of a problem: from a file of `save_states`, else random (the same numbers each time)."""
        generator = torch.Generator(problem.device).manual_seed(0)
        shape = (problem.sequences, problem.length)
        groups = problem.sequences // problem.responses
        rewards = -torch.arange(problem.responses, device=problem.device).repeat_interleave(groups).float()
        labels, tensors = (_random if states is None else _from_states(states))(problem, generator)
        grad_logps = torch.randn(shape, generator=generator, device=problem.device)
        for name, x in tensors.items():
            x.requires_grad_(name in problem.kind.gradients)
        return cls(problem, labels.reshape(shape), rewards, grad_logps, **tensors)

    @property
    def named(self) -> dict[str, Tensor]:
        """The large tensors by name."""
        if self.problem.from_logits:
            return {"logits": self.logits}
        return {"hidden": self.hidden, "weight": self.weight}

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get a gradient, by name."""
        return {name: x for name, x in self.named.items() if x.requires_grad}

    def transformed(self, logits: Tensor) -> Tensor:
        """Logits after the model's scale and softcap, in plain torch and in their own dtype, as model code does it."""
        if self.problem.logit_scale != 1:
            logits = logits * self.problem.logit_scale
        if self.problem.softcap is not None:
            logits = self.problem.softcap * torch.tanh(logits / self.problem.softcap)
        return logits

    def loss(self, token_logps: Tensor) -> tuple[Tensor, Tensor]:
        """The case's loss, and the log-probability of each response `[B]`, in plain torch. The row kernels know no
        loss: theirs is linear, with the gradient `grad_logps`."""
        token_logps = token_logps.reshape(self.labels.shape)
        logps = token_logps.sum(-1)
        if self.problem.kind.source == "rows":
            return (token_logps * self.grad_logps).sum(), logps
        implicit = BETA * logps.reshape(self.problem.responses, -1)
        return -implicit.log_softmax(0)[0].mean(), logps


def _random(problem: Problem, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits normal around Zipf's law, as peaked as a trained model's, and labels that follow the same law."""
    options: dict[str, Any] = dict(generator=generator, device=problem.device, dtype=problem.torch_dtype)
    shape = (problem.sequences, problem.length)
    zipf = -1.5 * torch.arange(1, problem.vocab + 1, device=problem.device).float().log()
    labels = torch.multinomial(zipf.exp(), problem.rows, replacement=True, generator=generator)
    if problem.from_logits:
        logits = torch.randn(*shape, problem.vocab, **options)
        # In the logits' dtype: a CPU would add a float32 row by way of a float32 copy of all.
        return labels, {"logits": logits.mul_(2).add_(zipf.to(logits.dtype)).div_(problem.logit_scale)}
    hidden = torch.randn(*shape, problem.hidden, **options)
    weight = torch.randn(problem.vocab, problem.hidden, **options)
    weight.mul_(2 / math.sqrt(problem.hidden) / problem.logit_scale)
    # One direction that all hidden states share carries Zipf's law.
    hidden[..., 0] = 4
    weight[:, 0] = zipf / 4 / problem.logit_scale
    return labels, {"hidden": hidden, "weight": weight}


# Real text ---------------------------------------------------------------------------------------------------------


def _from_states(path: Path) -> Any:
    saved = torch.load(path, mmap=True)

    def make(problem: Problem, _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        options: dict[str, Any] = dict(device=problem.device, dtype=problem.torch_dtype, copy=True)
        hidden = saved["hidden"][: problem.rows].to(**options).reshape(problem.sequences, problem.length, -1)
        labels = saved["labels"][: problem.rows].to(problem.device)
        if problem.from_logits:
            return labels, {"logits": F.linear(hidden, saved["weight"].to(problem.device, problem.torch_dtype))}
        return labels, {"hidden": hidden, "weight": saved["weight"].to(**options)}

    return make


class States(NamedTuple):
    """A file of hidden states, labels and head, and the shape it gives problems."""

    path: Path
    hidden: int
    vocab: int
    softcap: float | None
    logit_scale: float


def save_states(model: str, data: Path, rows: int) -> States:
    """Hidden states of a model at `rows` response tokens of a file of preference data, the tokens that they predict and
    the LM head, in a cache that later calls read.

    Args:
        model: directory, hub id or .gguf file.
        data: as `rpo-kernels train` takes it; every response of a prompt counts, one after the other.

    Raises:
        FileNotFoundError, ValueError: for data that is missing, does not fit or has fewer tokens.
    """
    from ..train.data import read_groups

    groups = read_groups(data)  # at once: what is wrong with the data shows before the model is loaded
    key = hashlib.sha256(data.read_bytes() if data.is_file() else str(data).encode())
    source = Path(model)
    key.update(f"{source.resolve() if source.exists() else model} {rows}".encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rpo_kernels" / "benchmark"
    path = folder / f"states-{key.hexdigest()[:20]}.pt"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(_read_text(model, groups, rows), partial)
        partial.replace(path)
    saved = torch.load(path, mmap=True)
    vocab, hidden = saved["weight"].shape
    return States(path, hidden, vocab, saved["softcap"], saved["logit_scale"])


@torch.no_grad()
def _read_text(model: str, groups: list, rows: int) -> dict[str, Any]:
    from ..integrations.model_head import find_head
    from ..train.dataset import PreferenceDataset
    from ..train.models import load_model, load_tokenizer

    tokenizer, network = load_tokenizer(model), load_model(model).eval()
    head = find_head(network)
    states: list[Tensor] = []
    labels: list[int] = []
    for group in groups:
        example = PreferenceDataset([group], tokenizer, _MAX_TOKENS)[0]
        for response in example.responses:
            ids = torch.tensor([[*example.prompt, *response]], device=head.weight.device)
            states.append(head.backbone(input_ids=ids).last_hidden_state[0, len(example.prompt) - 1 : -1])
            labels += response
        if len(labels) >= rows:
            break
    if len(labels) < rows:
        raise ValueError(f"the data has {len(labels)} response tokens, {rows} rows are asked for")
    if head.bias is not None:
        raise ValueError(f"the LM head of {model} has a bias, which the benchmark leaves out")
    return {
        "hidden": torch.cat(states)[:rows].bfloat16(),
        "labels": torch.tensor(labels[:rows]),
        "weight": head.weight.detach().bfloat16(),
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
    }
