"""Running something as an ordinary user, when the tests are root's."""

from __future__ import annotations

import sys
from pathlib import Path

NOBODY = 65534
"""The user and the group."""

# In a mount namespace of its own, where the interpreter can be reached although it may lie in a
# home directory that is closed to others.
_SCRIPT = """
mount --bind {python} {away}
case {python} in
    /root/*)
        mount -t tmpfs -o mode=755 closed /root
        mkdir -p {python}
        mount --bind {away} {python}
        ;;
esac
cd /
exec setpriv --reuid {user} --regid {user} --clear-groups env HOME={home} PYTHONPATH={path} \
    PYTHONDONTWRITEBYTECODE=1 "$@"
"""


def as_nobody(home: Path, *command: str | Path) -> list[str]:
    """The command line of `command` as an ordinary user whose home directory is `home`.

    Args:
        home: A directory of that user's.
        command: Program and arguments; this interpreter and its packages can be used.
    """
    away = home / ".python"
    away.mkdir()
    path = ":".join(path for path in sys.path if path)
    script = _SCRIPT.format(python=sys.base_prefix, away=away, user=NOBODY, home=home, path=path)
    return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh",
            *map(str, command)]  # fmt: skip
