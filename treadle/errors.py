"""Every way a run can end badly, each with its exit code. Messages say what to type next."""

from __future__ import annotations


class TreadleError(Exception):
    """Base of all errors that a user may see as one line instead of a traceback."""

    exit_code = 1


class ConfigError(TreadleError):
    """A configuration or an argument that cannot work."""

    exit_code = 2


class MissingExtra(ConfigError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an optional dependency: pip install 'treadle[{extra}]'")


class DataError(TreadleError):
    """Data that cannot be read or trained on; the message names file, place and reason."""

    exit_code = 65


class InputError(DataError):
    """A source the user named that is missing or empty: an input error, so exit code 2."""

    exit_code = 2


class NothingLearnt(InputError):
    """A conversation of which no token would be learnt: training on it would be for nothing, and not be noticed."""


class CheckpointError(TreadleError):
    """A checkpoint that is missing, damaged or of another shape."""

    exit_code = 65


class ShapeError(CheckpointError):
    """A sound checkpoint that belongs to another model: an input error, so exit code 2."""

    exit_code = 2


class OutOfMemory(TreadleError):
    """The device or the machine has too little memory; the message carries settings that need less."""

    exit_code = 71


class RunLocked(TreadleError):
    """Another process is writing to this run."""

    exit_code = 73


class SaveError(TreadleError):
    """A checkpoint could not be written; the previous one is intact."""

    exit_code = 74


class Diverged(TreadleError):
    """Training kept producing non-finite values."""

    exit_code = 76


class CallbackError(TreadleError):
    """A callback's hook failed; the run was saved before it ended."""

    exit_code = 1


class Stopped(TreadleError):
    """Training stopped on request before its last step; the same command continues."""

    exit_code = 75


class PeerFailed(TreadleError):
    """Another process of the run failed and has said so; this one ends with the same code and without repeating it."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


class PeerLost(TreadleError):
    """Another process of the run is gone; the same command continues."""

    exit_code = 75
