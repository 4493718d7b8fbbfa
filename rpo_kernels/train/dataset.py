"""Tokenised groups: in flat arrays, memory-mapped from a cache where they come from a file."""

import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import tokenizers
import transformers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .data import Group, iter_groups
from .tokenise import tokenise

FORMAT = 1  # of the cached arrays


@dataclass
class Example:
    """One group as token ids."""

    prompt: list[int]
    responses: list[list[int]]
    rewards: list[float]
    truncated_tokens: int  # cut off to fit max_length, over all responses (a prompt's cut counts once)
    ref_logps: list[float] | None = None


class _Arrays(NamedTuple):
    """G groups of R responses in all; a group's texts are its prompt and then its responses."""

    tokens: np.ndarray  # int32, all texts one after the other
    text_ends: np.ndarray  # int64 [G + R], where each text ends in `tokens`
    group_ends: np.ndarray  # int64 [G], where each group ends among the texts
    rewards: np.ndarray  # float32 [R]
    truncated_tokens: np.ndarray  # int64 [G]
    identical: np.ndarray  # int64 [G], responses with the same tokens as an earlier one of the group


class PreferenceDataset(Dataset):
    """Tokenised groups; an item is an `Example`.

    Args:
        groups: from `read_groups`.
        tokenizer: see `tokenise`.
        max_length: tokens of prompt and response together, at most. What is over is cut from the left of the prompt
            (its BOS token stays), down to half of max_length, then from the right of the response, and counted.
        progress: whether to show a progress bar.

    Attributes:
        ref_logps: the reference's log-probabilities, one for each response over all groups, or None.

    Raises:
        DataError: naming the group that cannot be tokenised, or all bad lines of the file.
    """

    def __init__(
        self, groups: Iterable[Group], tokenizer: PreTrainedTokenizerBase, max_length: int, progress: bool = False
    ):
        tokens = _Tokens()
        self._arrays = _encode(groups, tokenizer, max_length, tokens, progress)._replace(tokens=tokens.array())
        self.ref_logps: np.ndarray | None = None

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        limit: int | None = None,
        cache_dir: Path | None = None,
        progress: bool = False,
    ) -> "PreferenceDataset":
        """The groups of a file, or its first `limit`; tokenised once and then memory-mapped from `cache_dir`."""
        dataset = cls.__new__(cls)
        dataset.ref_logps = None
        if cache_dir is None:
            dataset.__init__(iter_groups(path, limit), tokenizer, max_length, progress)  # type: ignore[misc]
            return dataset
        folder = cache_dir / _cache_key(Path(path), tokenizer, max_length, limit)
        arrays = _load(folder)
        if arrays is None:
            groups = iter_groups(path, limit)
            _write(folder, lambda file: _encode(groups, tokenizer, max_length, file, progress))
            arrays = _load(folder)
        assert arrays is not None
        dataset._arrays = arrays
        return dataset

    def __len__(self) -> int:
        return len(self._arrays.group_ends)

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]
        texts, responses = self._texts(index), self._responses(index)
        return Example(
            self._text(texts.start),
            [self._text(text) for text in texts[1:]],
            self._arrays.rewards[responses].tolist(),
            int(self._arrays.truncated_tokens[index]),
            None if self.ref_logps is None else self.ref_logps[responses].tolist(),
        )

    def summary(self) -> str:
        """Groups, responses, and tokens kept and cut, in words."""
        arrays = self._arrays
        words = (
            f"{len(self)} groups, {len(arrays.rewards)} responses, {len(arrays.tokens)} tokens and "
            f"{arrays.truncated_tokens.sum()} cut off by max_length"
        )
        if arrays.identical.any():
            words += (
                f"; {arrays.identical.sum()} responses in {(arrays.identical > 0).sum()} groups have the same tokens "
                "as another one, and tell nothing apart"
            )
        return words

    def keys(self) -> list[str]:
        """Digest of each group's tokens: what the reference's log-probabilities depend on, beside the model."""
        keys = []
        for index in range(len(self)):
            texts = self._texts(index)
            ends = self._arrays.text_ends[texts.start : texts.stop]
            start = self._start(texts.start)
            digest = hashlib.sha256((ends - start).tobytes())
            digest.update(self._arrays.tokens[start : int(ends[-1])].tobytes())
            keys.append(digest.hexdigest())
        return keys

    def digest(self) -> str:
        """Digest of all tokens and rewards in their order, after the number of groups."""
        digest = hashlib.sha256()
        for values in self._arrays:
            digest.update(np.ascontiguousarray(values).data)
        return f"{len(self)} groups {digest.hexdigest()[:12]}"

    def largest_token(self) -> int:
        """The largest token id."""
        return int(self._arrays.tokens.max(initial=0))

    def longest(self) -> int:
        """Tokens of the longest prompt with a response."""
        arrays = self._arrays
        lengths = np.diff(arrays.text_ends, prepend=0)
        firsts = np.concatenate([[0], arrays.group_ends[:-1]])
        prompts = lengths[firsts]
        lengths[firsts] = 0  # so that a group's maximum is that of its responses
        return int((prompts + np.maximum.reduceat(lengths, firsts)).max())

    def responses(self, index: int) -> slice:
        """Where the responses of a group are among all, as in `ref_logps`."""
        return self._responses(range(len(self))[index])

    def _texts(self, index: int) -> range:
        ends = self._arrays.group_ends
        return range(int(ends[index - 1]) if index else 0, int(ends[index]))

    def _responses(self, index: int) -> slice:
        texts = self._texts(index)
        return slice(texts.start - index, texts.stop - index - 1)

    def _start(self, text: int) -> int:
        return int(self._arrays.text_ends[text - 1]) if text else 0

    def _text(self, text: int) -> list[int]:
        return self._arrays.tokens[self._start(text) : int(self._arrays.text_ends[text])].tolist()


class _Tokens:
    """Token ids written to memory rather than to a file."""

    def __init__(self) -> None:
        self._ids = array("i")

    def write(self, content: bytes) -> None:
        self._ids.frombytes(content)

    def array(self) -> np.ndarray:
        return np.frombuffer(self._ids, np.int32) if self._ids else np.empty(0, np.int32)


def _encode(
    groups: Iterable[Group],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tokens: "_Tokens | BinaryIO",
    progress: bool,
) -> _Arrays:
    """Tokenise; the token ids go to `tokens`, all else is returned."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
    text_ends, group_ends, truncated, identical = array("q"), array("q"), array("q"), array("q")
    rewards, end = array("f"), 0
    bar = tqdm(tokenise(groups, tokenizer), desc="Tokenising", unit=" groups", disable=not progress, leave=False)
    for group, prompt, responses in bar:
        prompt, responses, cut = _fit(prompt, responses, max_length, tokenizer.bos_token_id)
        for text in (prompt, *responses):
            tokens.write(array("i", text).tobytes())
            end += len(text)
            text_ends.append(end)
        group_ends.append(len(text_ends))
        rewards.extend(group.rewards)
        truncated.append(cut)
        identical.append(len(responses) - len({tuple(response) for response in responses}))
    integers = [np.array(values, np.int64) for values in (text_ends, group_ends, truncated, identical)]
    return _Arrays(np.empty(0, np.int32), integers[0], integers[1], np.array(rewards, np.float32), *integers[2:])


def _fit(
    prompt: list[int], responses: list[list[int]], max_length: int, bos: int | None
) -> tuple[list[int], list[list[int]], int]:
    """Prompt and responses cut to `max_length`, and how many tokens were cut off."""
    longest = max(map(len, responses))
    kept = min(len(prompt), max(max_length - longest, max_length // 2))
    room = max_length - kept
    truncated = len(prompt) - kept + sum(max(len(response) - room, 0) for response in responses)
    if kept < len(prompt) and kept > 1 and prompt[0] == bos:
        prompt = [bos, *prompt[len(prompt) - kept + 1 :]]
    else:
        prompt = prompt[len(prompt) - kept :]
    return prompt, [response[:room] for response in responses], truncated


def default_cache_dir() -> Path:
    """Where tokenised data and reference log-probabilities are kept unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rpo_kernels"


def _cache_key(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int, limit: int | None) -> str:
    """Digest of everything that the tokens depend on."""
    if not path.exists():
        raise FileNotFoundError(f"no preference data at {path}")
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            with open(file, "rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True) if backend is None else backend.to_str()
    versions = (FORMAT, transformers.__version__, tokenizers.__version__)
    # The path is part of the messages about what cannot be tokenised.
    own = (type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template, max_length, limit)
    digest.update(f"{versions} {own} {vocabulary}".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def _write(folder: Path, encode: Callable[[BinaryIO], _Arrays]) -> None:
    """Write the arrays aside and rename the folder; of two processes at once, the first to finish wins."""
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    try:
        with open(aside / "tokens.bin", "wb", buffering=1 << 20) as file:
            arrays = encode(file)
        for name, values in zip(_Arrays._fields[1:], arrays[1:], strict=True):
            np.save(aside / f"{name}.npy", values)
        if folder.exists():
            shutil.rmtree(folder)  # `_load` found it broken
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _load(folder: Path) -> _Arrays | None:
    """The arrays of a folder, memory-mapped; None if it is not there, or broken."""
    try:
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in _Arrays._fields[1:]]
        count = int(arrays[0][-1])
        tokens: np.ndarray = np.memmap(folder / "tokens.bin", np.int32, "r")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, IndexError):
        count, tokens = -1, np.empty(0, np.int32)
    if len(tokens) != count:
        print(f"{folder} is broken: tokenising again", flush=True)
        return None
    return _Arrays(tokens, *arrays)
