"""A program of its own: runs another one that sees a directory, and cannot write to it.

`python private_view.py DIRECTORY PROGRAM ARGUMENTS...` makes a mount namespace in which DIRECTORY
and what is mounted below it is read-only, then becomes PROGRAM. `--try` only tells whether such
namespaces can be had. Imports the standard library only, so that it starts quickly.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Of linux/sched.h, linux/mount.h, linux/fcntl.h and asm-generic/unistd.h, in that order.
_CLONE_NEWNS = 0x00020000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MS_REC = 16384
_MS_SLAVE = 1 << 19
_MOUNT_ATTR_RDONLY = 1
_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_SETATTR = 442


class _MountAttr(ctypes.Structure):
    """`struct mount_attr` (mount_setattr(2))."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def make_readonly(directory: bytes) -> None:
    """Have this process, and those that it becomes, see `directory` read-only.

    Raises:
        OSError: the kernel refused it; Linux 5.12 and root are needed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    # What is mounted on the host later is seen here; what is done here stays here.
    _checked(libc.unshare(_CLONE_NEWNS), "unshare")
    _checked(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "/")
    flags = ctypes.c_ulong(_MS_BIND | _MS_REC)
    _checked(libc.mount(directory, directory, None, flags, None), os.fsdecode(directory))
    attributes = _MountAttr(attr_set=_MOUNT_ATTR_RDONLY)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    done = libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), _AT_FDCWD, directory, _AT_RECURSIVE,
        ctypes.byref(attributes), size,
    )  # fmt: skip
    _checked(done, os.fsdecode(directory))


def main(words: list[str]) -> None:
    """What the module's first lines say."""
    try:
        if words == ["--try"]:
            make_readonly(b"/")
            libc = ctypes.CDLL(None, use_errno=True)
            _checked(libc.unshare(_CLONE_NEWPID | _CLONE_NEWNET), "unshare")
            return
        directory, *command = words
        make_readonly(os.fsencode(directory))
        os.execv(command[0], command)
    except OSError as error:
        sys.exit(f"cannot make {error.filename} read-only: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
