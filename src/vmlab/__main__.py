"""``python -m vmlab``: the command line, for where the ``vmlab`` script is not on the path."""

from __future__ import annotations

import sys

from vmlab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
