"""Whether another commit computes the same bits: every public result, over backends, dtypes, layouts and options.

    python bench/same_bits.py REV

builds REV in a temporary worktree, computes the same cases with both packages, and lists those whose results differ.
"""

import argparse
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TRANSFORMS = {"plain": {}, "softcap": dict(softcap=5.0), "scaled": dict(temperature=0.7, logit_scale=0.5)}
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main() -> int:
    """Compare; returns the exit status, 1 if any result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rev", help="commit to compare with")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        other = Path(folder) / "other"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", other, arguments.rev], cwd=ROOT, check=True)
        try:
            build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
            subprocess.run(build, cwd=other, check=True, stdout=subprocess.DEVNULL)
            before, after = results_of(other), results_of(ROOT)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", other], cwd=ROOT, check=True)
    different = [case for case in after if before.get(case) != after[case]]
    print(f"{len(after)} results compared with {arguments.rev}, {len(different)} differ")
    print("\n".join(different))
    return 1 if different else 0


def results_of(tree: Path) -> dict[str, str]:
    """Digest of each case, computed with the package of a source tree in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--digests"]
    done = subprocess.run(command, cwd=tree, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def digests() -> dict[str, str]:
    """Digest of values and gradients of each case."""
    import torch

    from rpo_kernels import CDPO, DPO, IPO, RPO, SimPO, linear_rpo_loss, rpo_loss

    def digest(*tensors: torch.Tensor) -> str:
        sha = hashlib.sha256()
        for x in tensors:
            sha.update(x.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()[:16]

    objectives = dict(
        rpo=RPO(), forward=RPO("fwd_kl"), square=RPO("sq"), dpo=DPO(), cdpo=CDPO(), ipo=IPO(), simpo=SimPO()
    )
    results = {}
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 9, 16, generator=generator), torch.randn(601, 16, generator=generator)
    labels = torch.randint(601, (6, 9), generator=generator)
    labels[:, :2] = -100
    rewards, reference = torch.randn(6, generator=generator), -torch.rand(6, 9, generator=generator)
    for backend, dtype, transform in itertools.product(("native", "torch", "triton"), DTYPES, TRANSFORMS):
        if dtype == "float64" and backend != "torch":
            continue
        for name, objective in objectives.items():
            if name != "rpo" and (dtype, transform) != ("float32", "plain"):
                continue
            ref = None if objective.reference_free else reference
            options: dict[str, Any] = dict(
                ref_logps=ref, objective=objective, shift=True, backend=backend, **TRANSFORMS[transform]
            )
            h, w = (x.to(getattr(torch, dtype)).requires_grad_() for x in (hidden, weight))
            logits = (h @ w.T).detach().requires_grad_()
            case = f"{backend} {dtype} {transform} {name}"
            out = rpo_loss(logits, labels, rewards, **options)
            results[f"logits {case}"] = digest(*out[:3], *torch.autograd.grad(out.loss, logits))
            for budget in (10**9, 0):
                out = linear_rpo_loss(h, w, labels, rewards, memory_budget=budget, **options)
                results[f"head {case} budget={budget}"] = digest(*out[:3], *torch.autograd.grad(out.loss, (h, w)))
    return results


if __name__ == "__main__":
    if sys.argv[1:] == ["--digests"]:
        print(json.dumps(digests()))
    else:
        sys.exit(main())
