"""`rpo-kernels info`: the version and which backends are live."""

from collections.abc import Sequence

from . import __version__, backend_info


def main(argv: Sequence[str]) -> int:
    """Print one line for each backend. Returns the exit status."""
    if argv:
        print("usage: rpo-kernels info\n\nShow the version and which backends are live, and why one is not.")
        return 0 if argv[0] in ("-h", "--help") else 2
    print(f"rpo-kernels {__version__}")
    for name, backend in backend_info().items():
        state = f"live on {backend['device']}, {backend['version']}" if backend["live"] else f"off: {backend['reason']}"
        print(f"  {name:<7} {state}")
    return 0
