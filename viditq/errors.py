"""Exceptions whose message is written for the user, not for a developer."""


class UserError(ValueError):
    """Bad input: the message says what was given, what is allowed and what to do.

    `run.py` prints it without a traceback and exits with status 2 (`debug=true` shows the traceback).
    """


class AlreadyReported(Exception):
    """The run failed in another process, which has said why: exit status 2 without another word."""


class GateFailed(Exception):
    """The run is complete and its numbers do not pass `gate`: exit status 3."""
