"""Errors that end the training command with one sentence, and its exit codes."""

FAILED = 1
WRONG_USAGE = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues


class UsageError(ValueError):
    """An error that the user can correct: printed as one sentence, without a stack trace."""


class RunError(Exception):
    """An error that ends a run on all ranks together: printed as one sentence."""


class DivergedError(RunError):
    """Training cannot continue: non-finite steps or weights, or replicas that differ."""
