"""Errors that the user can fix."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix: the programs print its message without a traceback and exit with status 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if the message is empty."""
    return str(error).strip().split("\n", 1)[0] or type(error).__name__


class SettingsError(UserError, ValueError):
    """An invalid setting. The message names the setting, the expected value, the actual value and a fix."""


class NotInstalled(UserError, RuntimeError):
    """A missing dependency. The message names the package to install."""


class ModelError(UserError, ValueError):
    """A model directory that cannot be used."""


class CheckpointError(UserError, ValueError):
    """A checkpoint that is damaged or belongs to another run."""
