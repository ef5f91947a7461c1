"""Errors a user can cause. The command line prints them as plain lines, without a traceback."""

from __future__ import annotations

import reprlib
from typing import Any


class UserError(ValueError):
    """Bad input: one line that names the field, the value received and the way out."""


class WriteError(UserError):
    """A file that could not be written: a full disk, a read-only or vanished folder. What was there is whole."""


class ReadError(UserError):
    """What is there and the system does not give: a failing disk, a network folder that is gone, missing rights.

    Nothing says that the file itself is damaged.
    """


class ConfigError(UserError):
    """All problems of one configuration at once.

    Args:
        problems: one line per problem, each naming its field, the value received and the way out.
        source: the file or object that was checked; it opens the message.
    """

    def __init__(self, problems: list[str], source: str | None = None):
        self.problems = list(problems)
        self.source = source
        head = f"{source}: " if source else ""
        super().__init__("\n".join(f"{head}{problem}" for problem in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions are otherwise made anew of their text alone, when one comes from another process."""
        return type(self), (self.problems, self.source)


def one_line(error: BaseException, length: int = 200) -> str:
    """What an exception says, in one line of at most so many characters; its kind where it says nothing."""
    return " ".join(str(error).split())[:length] or type(error).__name__


def shorten(value: Any, length: int = 120) -> str:
    """`repr` of a value for a message: cut in the middle when long, in depth and number of items as well.

    Not all of a huge or deeply nested value is visited.
    """
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxset, short.maxdict = 3, 8, 8, 8, 8
    short.maxstring = short.maxother = short.maxlong = length
    try:
        text = short.repr(value)
    except ValueError:  # an integer with more digits than Python writes out
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    return text if len(text) <= length else f"{text[: length // 2]}…{text[-length // 4 :]}"
