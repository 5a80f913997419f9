"""Memory of the process's own, beside the guest's RAM: state blocks, tables, decode records."""

from __future__ import annotations

import mmap


def own_memory(size: int) -> mmap.mmap:
    """`size` zero bytes that a fork copies.

    What Python's `mmap` gives unless it is told otherwise stays shared between parent and child.
    """
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
