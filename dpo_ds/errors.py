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


class Stopped(Exception):  # noqa: N818 (not an error)
    """A run that was asked to stop, and has saved what it needs to go on.

    It is raised on every rank at the same point, after saving. The command line exits with code 200.

    Attributes:
        reason: the signal or the deadline.
        step: the last optimizer step that was taken, 0 before the first.
        checkpoint: the newest checkpoint, relative to the output folder; None where nothing had to be saved.
    """

    def __init__(self, reason: str, *, step: int, checkpoint: str | None) -> None:
        """Says what ``RESUME.json`` will say."""
        super().__init__(f"stopped by {reason} after step {step}; the same command goes on from there")
        self.reason = reason
        self.step = step
        self.checkpoint = checkpoint


def first_line(error: BaseException) -> str:
    """Returns the first line of a library's message, or its class's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
