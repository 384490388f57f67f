"""Errors of the training command that its user can correct."""


class UsageError(ValueError):
    """An error that the user can correct: printed as one sentence, without a stack trace."""
