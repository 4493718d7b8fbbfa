"""Identity of a run: all settings and data that change the losses, which must be equal when it is resumed."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .config import Settings
from .dataset import PreferenceDataset

# Arguments of transformers that change no loss, beginning or whole name. What is not listed must not change.
HARMLESS = (
    *(
        "output_dir",
        "overwrite",
        "resume",
        "do_",
        "run_name",
        "project",
        "trackio_",
        "report_to",
        "hub_",
        "push_to_hub",
    ),
    *(
        "logging_",
        "log_",
        "disable_tqdm",
        "include_num_input_tokens_seen",
        "skip_memory_metrics",
        "debug",
        "local_rank",
    ),
    *("eval_", "per_device_eval_batch_size", "batch_eval_metrics", "prediction_loss_only", "include_for_metrics"),
    *("save_", "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "enable_jit_checkpoint"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent", "dataloader_prefetch"),
    *("dataloader_multi", "dataloader_in_order", "ddp_", "fsdp", "deepspeed", "use_cpu", "torch_empty_cache_steps"),
    *("torch_compile", "gradient_checkpointing", "activation_checkpointing", "use_liger_kernel", "liger_kernel_config"),
    *("average_tokens_across_devices", "restore_callback_states", "full_determinism", "remove_unused_columns"),
    *("accelerator_config", "parallelism_config", "auto_find_batch_size", "use_cache", "length_column_name"),
    # Counted together as the groups of a step.
    *("per_device_train_batch_size", "gradient_accumulation_steps"),
)
EXTENDABLE = ("max_steps", "num_train_epochs")
_SAMPLED = 1 << 16  # bytes of each of the blocks by which a large file is known
_BLOCKS = 64


def run_identity(settings: Settings, datasets: Mapping[str, PreferenceDataset]) -> dict[str, Any]:
    """Settings and digests by name, as JSON holds them."""
    args = settings.training
    training = {name: value for name, value in args.to_dict().items() if not name.startswith(HARMLESS)}
    training["groups a step"] = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    models = asdict(settings.model)
    for name in ("model", "ref_model"):
        models[name] = models[name] and source_digest(models[name])
    data = {f"{name} data": dataset.digest() for name, dataset in datasets.items()}
    objective = {name: value for name, value in asdict(settings.objective).items() if value not in (None, False)}
    identity = {**models, "max_length": settings.data.max_length, **data, **objective, **training}
    identity["gradient_filter"] = settings.run.gradient_filter
    return json.loads(json.dumps(identity, default=str))


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """What differs between two identities, in words by name."""
    absent = "not given"
    return {
        name: f"{then.get(name, absent)} then, {now.get(name, absent)} now"
        for name in dict.fromkeys([*then, *now])
        if then.get(name, absent) != now.get(name, absent)
    }


def source_digest(source: str) -> str:
    """Digest of a model's files (large ones by blocks over their whole length), or the name of one on a hub."""
    path = Path(source)
    if not path.exists():
        return source
    digest = hashlib.sha256()
    kinds = (".safetensors", ".bin", ".gguf", ".json", ".model")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in kinds)
    for file in files:
        if file.name in ("metrics.json", "run.json", "trainer_state.json"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with open(file, "rb") as content:
            for block in range(_BLOCKS) if size > _BLOCKS * _SAMPLED else [0]:
                content.seek(block * (size - _SAMPLED) // (_BLOCKS - 1) if size > _BLOCKS * _SAMPLED else 0)
                digest.update(content.read(_SAMPLED if size > _BLOCKS * _SAMPLED else size))
    return digest.hexdigest()[:16]
