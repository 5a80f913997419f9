"""The background manager of VMLAB_HOME, as the client starts it: it answers, then this returns."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from functools import partial
from typing import Final

from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import InvalidSpec, SpecProblem, VmlabError
from vmlab.manager.client.address import directory_of
from vmlab.manager.client.background import LOG
from vmlab.manager.service.detaching import Ready, detached

__all__ = ["LINGER_VARIABLE", "background", "main"]

LINGER_VARIABLE: Final = "VMLAB_LINGER_SECONDS"


def background(home: Home, ready: Ready) -> None:
    """Be the manager of a home until nothing needs it."""
    from vmlab.manager.api.logs import configure
    from vmlab.manager.service.listening import Listening
    from vmlab.manager.service.serving import LINGER, serve
    from vmlab.manager.settings import Settings

    configure()
    linger = _linger(LINGER)
    settings = Settings.from_environment(home=home)
    asyncio.run(serve(settings, Listening(), background=True, linger=linger, ready=ready))


def _linger(usual: float) -> float:
    """How long it stays after the last answer.

    Raises:
        InvalidSpec: the environment says something that is no time.
    """
    text = os.environ.get(LINGER_VARIABLE)
    if not text:
        return usual
    try:
        seconds = float(text)
        if not 0 < seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise InvalidSpec(
            [SpecProblem(LINGER_VARIABLE, text, "a number of seconds above 0")], what="environment"
        ) from None
    return seconds


def main() -> int:
    """Start it; prints where it answers, or the error's record, as JSON."""
    try:
        home = Home.open()
        facts = detached(directory_of(home) / LOG, partial(background, home))
    except VmlabError as error:
        print(json.dumps(error.to_record()))
        return error.exit_code
    print(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
