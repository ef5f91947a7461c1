"""Errors a user can cause. The command line prints them as plain lines, without a traceback."""


class UserError(ValueError):
    """Bad input: one line that names the field, the value received and the way out."""


class WriteError(UserError):
    """A file that could not be written: a full disk, a read-only or vanished folder. What was there is whole."""


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
