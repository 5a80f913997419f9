"""`python -m vmlab.engine MACHINE.toml`: a machine in a process of its own, driven over QMP."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from vmlab.machine.errors import VmlabError

USAGE = """usage: python -m vmlab.engine MACHINE.toml
       python -m vmlab.engine --fields

Run the machine that the file describes until it powers off or is told to quit. It is driven over
QMP, at the socket that the file names. Status: 0 after a power-off or `quit`, 1 if it failed, 2 if
it could not be made. --fields prints what may stand in the file."""


def main(arguments: list[str]) -> int:
    """Run the machine of the file that is named."""
    if arguments == ["--fields"]:
        from vmlab.engine.configuration import fields_text

        print(fields_text())
        return 0
    if len(arguments) != 1 or arguments[0].startswith("-"):
        asked = arguments in (["-h"], ["--help"])
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    # What is made from here to the first instruction lives as long as the process.
    gc.disable()
    from vmlab.engine.configuration import load
    from vmlab.engine.process import serve

    try:
        return serve(load(Path(arguments[0])))
    except VmlabError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.hint:
            print(f"hint: {error.hint}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
