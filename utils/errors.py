"""The one error type for a user's mistake."""


class UserError(Exception):
    """Something the user wrote cannot work.

    The message is one line that says what is wrong and what to write instead. Entry points
    (`main.py`, `tools.py`) print it and exit with status 2; no traceback is shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))
