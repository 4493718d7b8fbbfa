"""Train and evaluate in this process, alone or as one of several: what test_train_trainer compares."""

import json
import os
import sys
import time
from pathlib import Path

import rpo_kernels.train.reference as reference
from rpo_kernels import RPO
from rpo_kernels.train import RPOTrainer, attach_reference_logps
from rpo_kernels.train.demo import tokenizer
from training import arguments, dataset, parameters, tiny_model

METRICS = ("loss", "accuracy", "margin", "logp_best", "logp_worst", "scored_tokens", "dropped_tokens")


def run(out: Path, **backend: str) -> dict:
    """Two steps of four groups each, over however many processes there are; what the main process saw."""
    args = arguments(out, optim="sgd", learning_rate=0.1, max_grad_norm=0.0, max_steps=2, **backend)
    args.gradient_accumulation_steps = 2 // args.world_size
    train, held_out = dataset(8, (2, 4, 3)), dataset(7, (3, 2), seed=1)
    computed = attach_reference_logps([train, held_out], tiny_model(seed=1), args, cache_dir=out / "cache")
    trainer = RPOTrainer(tiny_model(), args, RPO(beta=0.5), train, held_out, processing_class=tokenizer())
    trainer.train()
    evaluation = trainer.evaluate()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {f"step {entry['step']} {name}": entry[name] for entry in logs for name in METRICS}
    result |= {f"evaluation {name}": evaluation[f"eval_{name}"] for name in METRICS}
    result |= {"computed": computed, "some parameters": parameters(trainer.model)[::997].tolist()}
    if trainer.is_world_process_zero():
        (out / "result.json").write_text(json.dumps(result))
    return result


def slow(function):
    """The function, late enough for the other process to be ahead."""
    return lambda *args: (time.sleep(2), function(*args))[1]


if __name__ == "__main__":
    if os.environ["RANK"] == "0":
        reference._read = slow(reference._read)
    run(Path(sys.argv[1]), ddp_backend="gloo")
