"""TRL's own tests of its trainers, with its loss layer and with this package's: which pass, and the metrics they log.

    git clone https://github.com/huggingface/trl checkout
    python bench/trl_own_tests.py checkout tests/test_dpo_trainer.py tests/test_kto_trainer.py

The tests come from the checkout, TRL itself is the one installed, models and data are made in --folder (trl_hub.py):
tests that need others, as those of vision models do, fail in both. This file is the runner and the pytest plugin.
"""

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

RESULT, PATCHED, FLOAT32 = (f"RPO_KERNELS_TRL_{name}" for name in ("RESULT", "PATCHED", "FLOAT32"))
# They need models that are not made here, or servers.
LEFT_OUT = " and ".join(f"not {name}" for name in ("vlm", "VLM", "vision", "Vision", "multimodal", "vllm"))
# Not in every version of TRL, and imported by files with tests of other functions.
GONE = {
    "trl.trainer.utils": ("patch_chunked_lm_head",),
    "trl.trainer.sft_trainer": ("_chunked_cross_entropy_loss", "_patch_chunked_ce_lm_head", "dft_loss"),
}
# Metrics of time, and those that only count.
_NOT_COMPARED = ("time", "_per_second", "runtime", "epoch", "num_tokens", "total_flos", "learning_rate")

_results: dict[str, dict[str, Any]] = {}
_running = ""


def pytest_configure() -> None:
    """Let the tests' helpers import from another version of TRL, patch it if asked to, and record what trainers log."""
    if not torch.cuda.is_available():  # Liger's kernels need a GPU, and stay in place for the tests after theirs
        sys.modules["liger_kernel"] = None  # type: ignore[assignment]
    import transformers

    import_utils = importlib.import_module("trl.import_utils")
    for name in ("harbor", "jmespath", "joblib", "liger_kernel", "math_verify", "mergekit", "openreward", "vllm"):
        if not hasattr(import_utils, f"is_{name}_available"):
            setattr(import_utils, f"is_{name}_available", lambda *_, **__: False)
    for module, names in GONE.items():
        for name in names:
            vars(importlib.import_module(module)).setdefault(name, None)
    if FLOAT32 in os.environ:
        config = importlib.import_module("trl.trainer.base_config")._BaseConfig
        own_check = config.__post_init__

        def in_float32(self: Any) -> None:
            self.bf16 = False if self.bf16 is None else self.bf16
            own_check(self)

        config.__post_init__ = in_float32
    if PATCHED in os.environ:
        from rpo_kernels.integrations.trl import patch

        patch()
    own_train = transformers.Trainer.train

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = own_train(self, *args, **kwargs)
        _results.setdefault(_running, {}).setdefault("logged", []).extend(self.state.log_history)
        return output

    transformers.Trainer.train = train  # type: ignore[method-assign]


def pytest_runtest_setup(item: Any) -> None:
    """Whose metrics the next ones are."""
    global _running
    _running = item.nodeid


def pytest_runtest_logreport(report: Any) -> None:
    """Keep how a test ended, and why it did not pass."""
    result = _results.setdefault(report.nodeid, {})
    if report.when == "call" or report.outcome != "passed":
        result["outcome"] = report.outcome
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            result["message"] = str(crash.message if crash else report.longrepr).strip().splitlines()[0][:200]


def pytest_sessionfinish() -> None:
    """Write the results for `run`."""
    Path(os.environ[RESULT]).write_text(json.dumps(_results), encoding="utf-8")


def run(folder: Path, tests: str, options: list[str], patched: bool) -> dict[str, Any]:
    """Results of one file of tests by test, from a process of its own."""
    result = folder / f"{Path(tests).stem}-{'patched' if patched else 'own'}.json"
    environment = {name: value for name, value in os.environ.items() if name != PATCHED}
    environment |= {
        RESULT: str(result),
        "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        **({PATCHED: "1"} if patched else {}),
    }
    flags = ["-p", Path(__file__).stem, "-p", "no:cacheprovider", "-q", "--tb=no", "-W", "ignore", "--timeout=120"]
    command = [sys.executable, "-m", "pytest", tests, *flags, "-k", LEFT_OUT, *options]
    result.unlink(missing_ok=True)
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    found = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    if not found:
        raise SystemExit(f"{tests} did not run: {done.stdout.decode()[-2000:]}")
    return found


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, str]:
    """Of the metrics that two runs of a test log first, relative to the larger of 1 and the value; and its name.

    The tests' learning rates are so large, and some trainers sample, that rounding alone drives the later ones apart.
    """
    differences = [(0.0, "")]
    for name, value in theirs["logged"][0].items():
        if not isinstance(value, int | float) or any(part in name for part in _NOT_COMPARED):
            continue
        difference = abs(ours["logged"][0].get(name, float("inf")) - value) / max(1.0, abs(value))
        if difference == difference:  # both NaN otherwise
            differences.append((difference, name))
    return max(differences)


def report(tests: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """Print counts, the tests that end otherwise, and how far metrics lie apart where both pass."""
    pairs = Counter((theirs[name].get("outcome"), ours.get(name, {}).get("outcome")) for name in theirs)
    counts = ", ".join(f"{own} / {patched}: {count}" for (own, patched), count in sorted(pairs.items(), key=str))
    print(f"{tests}: own / patched: {counts}")
    for name in theirs:
        if theirs[name].get("outcome") != ours.get(name, {}).get("outcome"):
            print(f"  DIFFERS {name}: own {theirs[name]}, patched {ours.get(name)}"[:1200])
    failed = Counter(result["message"] for result in theirs.values() if "message" in result)
    for message, count in failed.most_common():
        print(f"  TRL's own: {count} x {message[:100]}")
    trained = [name for name in theirs if theirs[name].get("logged") and theirs[name]["outcome"] == "passed"]
    apart = sorted(((*largest_difference(ours[name], theirs[name]), name) for name in trained), reverse=True)
    if apart:
        print(f"  first metrics of {len(apart)} trainings: median {apart[len(apart) // 2][0]:.1e}, largest:")
        for difference, metric, name in apart[:5]:
            print(f"    {difference:.1e} {metric} {name.split('::', 1)[1]}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of TRL's repository, whose tests and scripts are taken")
    parser.add_argument("tests", nargs="+", help="files of tests in it")
    parser.add_argument("--folder", type=Path, default=Path("trl-own-tests"), help="for models, data and results")
    parser.add_argument("--float32", action="store_true", help="models too, and no autocast: metrics agree better")
    args, options = parser.parse_known_args()
    if args.float32:
        os.environ[FLOAT32] = "1"

    from trl_hub import make_hub

    folder = args.folder.resolve() / ("float32" if args.float32 else "bfloat16")
    make_hub(folder, args.checkout, torch.float32 if args.float32 else torch.bfloat16)
    shutil.copytree(args.checkout / "tests", folder / "tests", dirs_exist_ok=True)
    for tests in args.tests:
        theirs, ours = (run(folder, tests, options, patched) for patched in (False, True))
        report(tests, theirs, ours)


if __name__ == "__main__":
    main()
