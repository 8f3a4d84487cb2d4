"""Errors that a user can act on. The lowest floor holds what all floors share.

Every message has up to four parts: *where* (file, node, tensor), *found*, *expected* and *do* (the remedy, a line
that works). The exit code of the command line is a class attribute, so that one handler serves every command.
"""

from __future__ import annotations


class QpipeError(Exception):
    """Base of every error that qpipe raises on purpose.

    Args:
        what: One sentence that says what is wrong.
        where: File, node or tensor concerned.
        found: What was met.
        expected: What would have been right.
        do: What to do next; a command line in it must parse.
    """

    exit_code = 70

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        found: str | None = None,
        expected: str | None = None,
        do: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.found = found
        self.expected = expected
        self.do = do

    def parts(self) -> dict[str, str]:
        """Return the given parts by label, in the order in which they are printed."""
        labels = {"where": self.where, "found": self.found, "expected": self.expected, "do": self.do}
        return {label: text for label, text in labels.items() if text}

    def __str__(self) -> str:
        lines = [f"  {label:<9}: {text}" for label, text in self.parts().items()]
        return "\n".join([self.what, *lines])


class ThresholdError(QpipeError):
    """A result is below a threshold that the user set."""

    exit_code = 1


class UsageError(QpipeError):
    """The command line, or a path on it, cannot be used."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe, scheme, pattern or option names something that does not exist."""


class ModelError(QpipeError):
    """The model is broken, unsafe or already quantized."""

    exit_code = 3


class UnsupportedError(ModelError):
    """The model is sound, but qpipe or the target cannot do what was asked."""


class DataError(QpipeError):
    """Calibration or validation data, or a statistics file, cannot be used."""

    exit_code = 4


class EnvironmentError_(QpipeError):  # noqa: N801, N818 - the plain name is a builtin
    """A package, an execution provider or the plugin is missing or unusable."""

    exit_code = 5


class PluginError(EnvironmentError_):
    """The plugin library cannot be built, found or loaded."""


class WriteError(QpipeError):
    """The result cannot be written; nothing was left at the target."""

    exit_code = 6
