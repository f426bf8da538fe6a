"""What can go wrong and be mended by the user: one message, and the way out.

The command prints these without a traceback and exits with :attr:`DiffusionBlocksError.exit_code`.
"""

from __future__ import annotations


class DiffusionBlocksError(Exception):
    """Base of all errors a user can mend: ``message`` says what was found, ``hint`` what to do."""

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class BadInput(DiffusionBlocksError):
    """Wrong use, or an input that is refused."""


class BundleError(DiffusionBlocksError):
    """A bundle with a missing, truncated, altered or unsafe file."""


class CheckFailed(DiffusionBlocksError):
    """A check was made and failed."""

    exit_code = 1
