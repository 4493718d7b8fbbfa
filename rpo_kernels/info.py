"""`rpo-kernels info`: the version, the available backends, and the matrix products that the LM head uses here."""

from collections.abc import Sequence

import torch

from . import __version__, backend_info
from .head import gemm
from .kernels import native_head


def main(argv: Sequence[str]) -> int:
    """Print one line for each backend and one for the head's products. Returns the exit status."""
    if argv:
        print("usage: rpo-kernels info\n\nShow the version and which backends are available, and why one is not.")
        return 0 if argv[0] in ("-h", "--help") else 2
    print(f"rpo-kernels {__version__}")
    for name, backend in backend_info().items():
        state = (
            f"available on {backend['device']}, {backend['version']}"
            if backend["available"]
            else f"unavailable: {backend['reason']}"
        )
        print(f"  {name:<7} {state}")
    print(f"  products of a bfloat16 head on this CPU: {native_head.describe()}")
    if torch.cuda.is_available():
        print(f"  products of the head on {torch.cuda.get_device_name()}: {gemm.describe('cuda')}")
    return 0
