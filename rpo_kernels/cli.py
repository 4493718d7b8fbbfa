"""The command line: `rpo-kernels <command> ...`. A command's module is imported when the command is asked for."""

import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from ._interruption import STATUS, report_interruption


class Command(NamedTuple):
    """A command: `module` has `main(argv) -> exit status` and needs the package's `extra`, if any."""

    module: str
    extra: str | None
    summary: str
    resumes: bool = False  # whether `--resume` continues an interrupted call


COMMANDS = {
    "train": Command(
        "rpo_kernels.train.command", "train", "train a model on preference data (no arguments: a demonstration)", True
    ),
    "bench": Command("rpo_kernels.benchmark.bench", "bench", "time, memory and error beside other libraries", True),
    "memory": Command("rpo_kernels.benchmark.memory", "bench", "memory of the loss layer, and what fits a card"),
    "info": Command("rpo_kernels.info", None, "show the version and which backends are available"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        print(f"rpo-kernels: unknown command {name!r}\n\n{_help()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    try:
        return importlib.import_module(command.module).main(rest)
    except (KeyboardInterrupt, Exception) as error:
        if _is_interruption(error):
            report_interruption(name, command.resumes)
            return STATUS
        package = error.name if isinstance(error, ModuleNotFoundError) else None
        if command.extra is None or package is None or package.startswith("rpo_kernels"):
            raise
        install = f'pip install "rpo-kernels[{command.extra}]"'
        print(f"rpo-kernels {name} needs the package {package!r}: {install}", file=sys.stderr)
        return 1


def _is_interruption(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused an error: during an import it may surface as any other."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _help() -> str:
    lines = [f"  {name:<8} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: rpo-kernels <command> [--help] ...", "", "commands:", *lines])


if __name__ == "__main__":
    sys.exit(main())
