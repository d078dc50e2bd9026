"""The exceptions that end a run with one line."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the key or file, the value, what was expected and the remedy. The command line
    prints it as ``error: <message>`` and exits with code 2, without a traceback.
    """


class PeerError(Exception):
    """Another rank has met an error and says so itself: this one leaves in silence, with exit code 2."""


class RunError(Exception):
    """A run that cannot be right and stops: not the user's typing, but nothing to go on with either.

    The message is one line that names the step and what is wrong. The command line prints it as ``error: <message>``
    and exits with code 1.
    """


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's message, or its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
