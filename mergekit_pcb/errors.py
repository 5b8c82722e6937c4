"""The errors that a user's mistake ends in: what, why and what to do, no traceback."""

from __future__ import annotations

import click

#: What mergekit and pydantic raise for a configuration they cannot use.
HOST_ERRORS = (OSError, RuntimeError, TypeError, ValueError)


def printable(text: str) -> str:
    """A text for a terminal or a picture: what would move a cursor or turn text around is shown."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """What an error says, fit for the middle of a sentence."""
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def is_hosts(error: Exception) -> bool:
    """Whether this is what mergekit, or what it calls, raises for what it cannot use.

    Exceptions that others define count, too: the Hub's client and validators have bases of their
    own.
    """
    ours = ("builtins", str(__package__))
    return isinstance(error, HOST_ERRORS) or type(error).__module__.split(".")[0] not in ours


class PCBError(click.ClickException, ValueError):
    """A request that cannot be carried out: cannot X, because Y, do Z.

    mergekit's commands are click commands: click prints this as one ``Error:`` line and exits
    with status 1, where any other exception would show a traceback. In memory it is an ordinary
    ``ValueError``.
    """

    def __init__(self, cannot: str, because: str, remedy: str) -> None:
        super().__init__(printable(f"cannot {cannot}, because {because}; {remedy}."))
        self.parts = (cannot, because, remedy)

    def __reduce__(self) -> tuple[type[PCBError], tuple[str, str, str]]:
        return type(self), self.parts
