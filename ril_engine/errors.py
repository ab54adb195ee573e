"""The one exception that reaches a user: its text is printed as a single line and the exit code is 2."""


class UserError(Exception):
    """Bad input or environment. The message says what, what was got, what was expected, and what to do."""
