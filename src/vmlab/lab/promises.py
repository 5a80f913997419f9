"""What a lab was let in for: the reservations of its machines and templates, by their names.

Used by the threads of tests and by the event loop at the same time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from vmlab.lab.admission import Admission, Claim, Reservation

__all__ = ["Promises"]


class Promises:
    """The reservations of one lab.

    Args:
        admission: Where they are made; None lets everything in.
    """

    def __init__(self, admission: Admission | None) -> None:
        self._admission = admission
        self._lock = threading.Lock()
        self._made: dict[str, Reservation] = {}

    def ask(self, claims: Mapping[str, Claim], free_up: Callable[[], object]) -> None:
        """Wait until there is memory for all of `claims`; what was let in already is.

        Args:
            claims: By the name under which each is given back.
            free_up: Called while it waits: gives back what can be done without.

        Raises:
            ResourceExhausted: there is never going to be so much, as far as can be known.
        """
        if self._admission is None:
            return
        with self._lock:
            wanted = {name: claim for name, claim in claims.items() if name not in self._made}
        found = self._admission.reserve(list(wanted.values()), free_up=free_up)
        with self._lock:
            self._made |= dict(zip(wanted, found, strict=True))

    def give_back(self, *names: str) -> None:
        """Give memory back, if there was any by those names."""
        with self._lock:
            found = [self._made.pop(name) for name in names if name in self._made]
        if self._admission is not None:
            self._admission.release(*found)

    def began(self, name: str, machine: int | None, *, forked: bool) -> None:
        """Something runs, as the process with that pid; a fork has what it wrote."""
        with self._lock:
            found = self._made.get(name)
        if self._admission is not None and found is not None:
            self._admission.began(found, machine, forked=forked)

    def close(self) -> None:
        """Give back all that there is."""
        with self._lock:
            self._made.clear()
        if self._admission is not None:
            self._admission.close()
