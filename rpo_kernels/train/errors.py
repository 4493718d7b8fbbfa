"""Errors that end a run with one line in place of a traceback."""


class RunError(Exception):
    """A run that cannot start or continue as requested; the message says what to do."""


class NonFiniteError(RunError):
    """A loss or gradient that is not finite: names the step, the prompts of its batch and what to try."""
