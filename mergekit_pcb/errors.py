"""The one kind of error that a user's mistake ends in."""

from __future__ import annotations

import click


class PCBError(click.ClickException, ValueError):
    """A request that cannot be carried out, told in three beats.

    mergekit's commands are click commands: click prints this as one ``Error:`` line and
    exits with status 1, so the stock commands show a sentence where any other exception
    would show a traceback. In memory it is an ordinary ``ValueError``.
    """

    def __init__(self, cannot: str, because: str, remedy: str) -> None:
        super().__init__(f"cannot {cannot}; because {because}; {remedy}.")
        self.beats = (cannot, because, remedy)

    def __reduce__(self) -> tuple[type[PCBError], tuple[str, str, str]]:
        return type(self), self.beats
