"""Ctrl-C at the command line: one line and exit status 130."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STATUS = 130  # as shells report a process that SIGINT ended


def report_interruption(command: str, resumes: bool) -> None:
    """Print what was interrupted, and how to go on."""
    hint = "; --resume goes on from what was saved" if resumes else ""
    print(f"rpo-kernels {command}: interrupted{hint}", file=sys.stderr, flush=True)


@contextmanager
def exits_at_once(command: str, resumes: bool) -> Iterator[None]:
    """For imports of libraries, when nothing is there to be saved: they may swallow KeyboardInterrupt or turn it into
    another exception."""

    def leave(*_: object) -> None:
        report_interruption(command, resumes)
        os._exit(STATUS)

    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()  # which alone may set handlers
    if not is_main or before is signal.SIG_IGN:  # ignored in the background of a shell
        yield
        return
    signal.signal(signal.SIGINT, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
