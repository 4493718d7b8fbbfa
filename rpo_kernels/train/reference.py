"""Log-probabilities of the reference model: computed once, before training, and cached on disk.

The cache is a file for each reference model and precision, with a line for each group of responses, found by its
tokens: after a change of data or lengths only new groups are computed, and an interrupted run continues.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from ..kernels import dispatch
from .batches import BatchForm, response_logps_by_group
from .dataset import Example, PreferenceDataset, default_cache_dir
from .errors import NonFiniteError
from .loss_layer import LossLayer
from .models import base_model

LogpsByKey = dict[str, list[float]]
VOLATILE_CONFIG = ("_name_or_path", "transformers_version", "use_cache")


def attach_reference_logps(
    datasets: Iterable[PreferenceDataset],
    model: nn.Module,
    args: TrainingArguments,
    pad_token_id: int = 0,
    cache_dir: str | Path | None = None,
    loss_layer: LossLayer | None = None,
    batch_form: BatchForm | None = None,
    with_adapter: bool = False,
) -> int:
    """Give every response of the datasets its log-probability under `model`.

    Call it before training where the policy is its own reference. With several processes each computes its share.

    Args:
        datasets: changed in place.
        model: the reference; moved to `args.device`.
        args: device, mixed precision, `per_device_eval_batch_size` and processes.
        pad_token_id: pads the batches of the default `batch_form`.
        cache_dir: default `default_cache_dir() / "reference"`.
        loss_layer, batch_form: as for `RPOTrainer`.
        with_adapter: whether the model's adapter (PEFT), if any, is part of the reference, or switched off.

    Returns:
        How many groups had to be computed, over all processes; the others were in the cache.
    """
    datasets = list(datasets)
    model.to(args.device)
    loss_layer = loss_layer or LossLayer.of(model)
    batch_form = batch_form or BatchForm.of(model, pad_token_id=pad_token_id)
    key = _model_key(model, args, f"{loss_layer.source} {'shared' if batch_form.shared else 'padded'}", with_adapter)
    path = Path(cache_dir or default_cache_dir() / "reference") / f"{key}.jsonl"
    known: LogpsByKey = {}
    # One process reads for all: another might already see what a third has written, and share out the work otherwise.
    _exchange(known, _read(path) if args.process_index == 0 else {}, args.world_size)
    computed = 0
    for dataset in datasets:
        keys = dataset.keys()
        sizes = [part.stop - part.start for part in map(dataset.responses, range(len(dataset)))]
        todo = {key: index for index, key in enumerate(keys) if len(known.get(key, ())) != sizes[index]}
        computed += len(todo)
        share = _Chosen(dataset, list(todo.items())[args.process_index :: args.world_size])
        with contextlib.nullcontext() if with_adapter else _adapter_off(model):
            new = _compute(share, model, args, path, loss_layer, batch_form)
        _exchange(known, new, args.world_size)
        dataset.ref_logps = np.array([logp for key in keys for logp in known[key]], np.float32)
    return computed


class _Chosen(Dataset):
    """Some groups of a dataset, each with its key."""

    def __init__(self, dataset: PreferenceDataset, chosen: list[tuple[str, int]]):
        self.dataset = dataset
        self.chosen = chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> tuple[str, Example]:
        key, place = self.chosen[index]
        return key, self.dataset[place]


def _compute(
    share: _Chosen,
    model: nn.Module,
    args: TrainingArguments,
    path: Path,
    loss_layer: LossLayer,
    batch_form: BatchForm,
) -> LogpsByKey:
    """Log-probabilities of the groups, each written to the cache as soon as it is known."""
    computed: LogpsByKey = {}
    if not len(share):
        return computed

    def collate(pairs: list[tuple[str, Example]]) -> tuple[list[str], dict]:
        return [key for key, _ in pairs], batch_form([example for _, example in pairs])

    loader: DataLoader = DataLoader(share, args.per_device_eval_batch_size, collate_fn=collate)
    quiet = args.disable_tqdm or args.process_index != 0
    places = dict(share.chosen)
    training = model.training
    model.eval()
    with _autocast(args), _open_to_append(path) as file:
        for keys, batch in tqdm(loader, desc="Reference log-probabilities", unit=" batches", disable=quiet):
            logps = response_logps_by_group(model, batch, loss_layer)
            for key, values in zip(keys, logps, strict=True):
                _check_finite(values, share.dataset, places[key])
                computed[key] = values.tolist()
                # One write a line, so that processes may share the file.
                os.write(file, (json.dumps({"key": key, "logps": computed[key]}) + "\n").encode())
    model.train(training)
    return computed


def _check_finite(logps: torch.Tensor, dataset: PreferenceDataset, index: int) -> None:
    if not logps.isfinite().all():
        raise NonFiniteError(
            f"the reference gives group {index + 1} the log-probabilities {logps.tolist()}: its weights, or their type "
            f"(--dtype), are at fault; the prompt starts with the tokens {dataset[index].prompt[:20]}"
        )


def _read(path: Path) -> LogpsByKey:
    """What the cache holds. What does not read as its lines do, as after an interruption, is computed again."""
    known: LogpsByKey = {}
    broken = 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            key, logps = entry["key"], [float(logp) for logp in entry["logps"]]
            if not (isinstance(key, str) and all(map(math.isfinite, logps))):
                raise ValueError
        except (ValueError, TypeError, KeyError):
            broken += 1
        else:
            known[key] = logps
    if broken:
        print(f"{path} holds {broken} broken lines: what they were for is computed again", flush=True)
    return known


@contextlib.contextmanager
def _open_to_append(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and path.read_bytes()[-1:] != b"\n"
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if torn:
            os.write(file, b"\n")
        yield file
    finally:
        os.close(file)


def _exchange(known: LogpsByKey, computed: LogpsByKey, world_size: int) -> None:
    """Add to `known` what all processes have computed."""
    shares = [computed]
    if world_size > 1:
        shares = [{}] * world_size
        torch.distributed.all_gather_object(shares, computed)
    for share in shares:
        known.update(share)


def _adapter_off(model: nn.Module) -> contextlib.AbstractContextManager:
    return model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()  # type: ignore[operator]


def _autocast(args: TrainingArguments) -> contextlib.AbstractContextManager:
    """The mixed precision that training runs in, so that policy and reference round alike."""
    if not (args.bf16 or args.fp16) or (args.fp16 and args.device.type == "cpu"):  # where Trainer does not either
        return contextlib.nullcontext()
    return torch.autocast(args.device.type, torch.bfloat16 if args.bf16 else torch.float16)


def _model_key(model: nn.Module, args: TrainingArguments, way: str, with_adapter: bool) -> str:
    """Digest of the model's configuration and weights, and of how it is computed."""
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "none"
    backend = dispatch.choose(torch.empty(0, device=args.device), None)
    digest = hashlib.sha256(f"{args.device.type} {precision} {torch.__version__} {backend} {way}".encode())
    base = base_model(model)
    config = {k: v for k, v in base.config.to_dict().items() if k not in VOLATILE_CONFIG}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    adapter = None if with_adapter else getattr(getattr(model, "base_model", None), "prefix", None)
    if with_adapter:
        digest.update(repr({k: v.to_dict() for k, v in getattr(model, "peft_config", {}).items()}).encode())
    seen = set()
    for name, tensor in base.state_dict().items():
        # Tied weights count once; PEFT renames what it wraps.
        if (adapter is not None and adapter in name) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        digest.update(f"{name.replace('.base_layer.', '.')} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
