"""What can go wrong and be mended by the user: one message, and the way out.

    DiffusionBlocksError
        BadInput            wrong use, or an input that is refused
            InputError      a batch of other names, types or shapes than the network takes, or with NaN
            BudgetError     a memory budget below the smallest that works
            DeviceError     a device that is not there
                FallbackError   onnxruntime would have run on the CPU without a word
            ClosedError     a bundle that was closed
        BundleError         a bundle that is damaged or unsafe
            FormatError     a bundle of another format
            FileError       a file that is missing, cut off or altered
        CheckFailed         a check was made and failed

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


def printable(text: str) -> str:
    """Text with what a terminal would obey written out: names in it may come from a stranger's file."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class BadInput(DiffusionBlocksError):
    """Wrong use, or an input that is refused."""


class InputError(BadInput):
    """A batch of other names, types or shapes than the network takes, or with values that are no numbers."""


class BudgetError(BadInput):
    """A memory budget below the smallest that works, which the hint says."""


class DeviceError(BadInput):
    """A device that is not there."""


class FallbackError(DeviceError):
    """A session that onnxruntime opened on the CPU although a device was asked for."""


class ClosedError(BadInput):
    """A bundle that was closed."""


class BundleError(DiffusionBlocksError):
    """A bundle that is damaged or unsafe."""


class FormatError(BundleError):
    """A bundle of a format that this version does not read."""


class FileError(BundleError):
    """A file of a bundle that is missing, cut off, altered or cannot be read."""


class CheckFailed(DiffusionBlocksError):
    """A check was made and failed."""

    exit_code = 1
