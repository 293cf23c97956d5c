"""The one exception whose message is written for the user, not for a developer."""


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and what to do.

    `run.py` prints it without a traceback and exits with status 2 (`debug=true` shows the traceback).
    """
