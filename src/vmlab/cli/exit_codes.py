"""What the exit status of ``vmlab`` means. The reference page of the docs is made from here.

Codes above 128 follow the shells: 128 plus the number of the signal. 70 is ``EX_SOFTWARE`` of
``sysexits.h``.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["ExitCode"]


class ExitCode(IntEnum):
    """Exit status of a ``vmlab`` command; `meaning` says it in words."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.meaning = meaning
        return member

    OK = 0, "What was asked for was done."
    FAILED = 1, "It was done, and the answer is no: a test, a check or a comparison failed."
    USAGE = 2, "The command line or a file it names is wrong; nothing was started."
    CANNOT = 3, "It could not be done; the message says what came back, the hint what to try."
    UNAVAILABLE = 4, "The hypervisor cannot be used here, or the host lacks something it needs."
    INTERNAL = 70, "A mistake in vmlab itself; the traceback on stderr belongs in a bug report."
    INTERRUPTED = 130, "Ended by Ctrl-C (SIGINT); what had been started was cleared away."
    BROKEN_PIPE = 141, "Whatever read the output went away (SIGPIPE), as in `vmlab ... | head`."
