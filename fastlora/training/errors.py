"""The two ways a run ends badly. The command line prints the message and exits by the code."""

from __future__ import annotations


class FineTuneError(Exception):
    """Base of the errors that a user can act on: the message says what happened and what to do."""

    exit_code = 1


class InputError(FineTuneError):
    """What was asked for cannot be run (a path, an option, the data). Nothing was started."""

    exit_code = 2


class RunError(FineTuneError):
    """The run started and could not go on. What was saved before stays valid."""

    exit_code = 1


class Interrupted(RunError):
    """A signal stopped the run, its state saved. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
