"""The two errors that entry points answer with one line: a user's mistake, and a run that cannot go on."""


def printable(text: str) -> str:
    """Text from a file for a terminal or a log: what is no printable character is escaped, as in Python's strings."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class UserError(Exception):
    """Something the user wrote cannot work.

    The message is one line that says what is wrong and what to write instead. Entry points
    (`main.py`, `tools.py`) print it and exit with status 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))


class TrainingError(Exception):
    """Training cannot go on, through no mistake in the options; `main.py` exits with status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(" ".join(message.split())))
