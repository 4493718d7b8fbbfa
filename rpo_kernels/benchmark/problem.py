"""The benchmark's cases, and the sizes of one problem. Imports neither torch nor other large packages."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

    from ..kernels.interface import TokenOptions

BETA = 0.01  # of the loss; small, so that random inputs do not saturate it
DTYPES = ("bfloat16", "float16", "float32")


class Case(NamedTuple):
    """One kind of work, done by every implementation that starts from its source in the same way.

    Every case but `rows` goes from logits, or hidden states and the LM head's weight, to a preference loss over groups
    of K responses (DPO for K = 2, its Plackett-Luce form above), and back to the gradients it names.
    """

    source: str  # whose implementations take part: "rows", "logits" or "head"
    gradients: tuple[str, ...]  # the tensors that need one
    references: tuple[str, ...]  # what the machine does just before and just after each sample, see references.py
    summary: str


CASES = {
    "rows": Case("rows", ("logits",), ("read", "copy"), "the two row kernels: statistics, then gradient, of logits"),
    "logits": Case("logits", ("logits",), ("copy",), "logits to loss, and back"),
    "logits-eval": Case("logits", (), ("read",), "logits to loss, no gradient"),
    "head": Case("head", ("hidden", "weight"), ("gemm",), "hidden states and LM head to loss, and back"),
    "head-frozen": Case("head", ("hidden",), ("gemm",), "the same, no gradient for the LM head (LoRA)"),
    "head-eval": Case("head", (), ("gemm",), "the same, no gradient"),
}


class Problem(NamedTuple):
    """A case and its sizes; `rows` scored positions in `sequences` responses of `length` tokens."""

    case: str  # of CASES
    model: str  # where the sizes come from, for the reader
    sequences: int
    length: int
    vocab: int
    hidden: int  # 0 where logits are given
    responses: int = 2  # K: the sequences are grouped by K, stacked
    dtype: str = "bfloat16"
    device: str = "cpu"
    softcap: float | None = None
    logit_scale: float = 1.0
    text: str | None = None  # the data that the model's hidden states are of; None for random inputs

    @property
    def kind(self) -> Case:
        return CASES[self.case]

    @property
    def from_logits(self) -> bool:
        return self.kind.source != "head"

    @property
    def rows(self) -> int:
        return self.sequences * self.length

    @property
    def torch_dtype(self) -> "torch.dtype":
        import torch

        return getattr(torch, self.dtype)

    @property
    def itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocab * self.itemsize

    @property
    def options(self) -> "TokenOptions":
        from ..kernels.interface import TokenOptions

        return TokenOptions(logit_scale=self.logit_scale, softcap=self.softcap)

    @property
    def sizes(self) -> str:
        hidden = "" if self.from_logits else f"H={self.hidden}, "
        text = f", text of {self.text}" if self.text else ""
        return f"{self.rows} rows, {hidden}V={self.vocab}, K={self.responses}, {self.dtype}{text}"

    @property
    def title(self) -> str:
        return f"{self.case}, {self.model}: {self.sizes}"

    def small(self, max_flops: float) -> "Problem":
        """The problem with responses short enough for the float64 truth to cost no more than this."""
        per_row = 2.0 * self.vocab * max(self.hidden, 32)
        rows = max(int(max_flops / per_row), 8 * self.responses)
        if self.rows <= rows:
            return self
        return self._replace(sequences=self.responses, length=rows // self.responses)


def sequences_of(rows: int, responses: int, length: int = 512) -> tuple[int, int]:
    """Sequences and their length that make up about that many rows: whole groups of K, of about `length` tokens."""
    groups = max(1, round(rows / (responses * length)))
    return groups * responses, max(1, rows // (groups * responses))
