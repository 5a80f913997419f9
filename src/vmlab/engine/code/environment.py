"""The floating-point environment of the host's thread that is about to execute a guest.

Generated code computes with the host's unit and leaves its control register as it is, which has to
be as the ABI says then: to nearest, with subnormal numbers. A library that was built with
-ffast-math, for one, changes that for all who load it. What it is, arithmetic itself tells.
"""

from __future__ import annotations

import sys

from vmlab.machine.errors import VmlabError

_ONE, _STEP = 1.0, sys.float_info.epsilon
_SMALLEST_NORMAL, _SMALLEST = sys.float_info.min, 5e-324


def check_floating_environment() -> None:
    """Make sure that the calling thread computes as IEEE 754 has it by default.

    Raises:
        VmlabError: it does not.
    """
    up, down = _ONE + _STEP * 0.75, _ONE + _STEP * 0.25
    to_nearest = up == _ONE + _STEP and down == _ONE and -_ONE - _STEP * 0.25 == -_ONE
    subnormal = _SMALLEST_NORMAL * 0.5 > 0.0 and _SMALLEST * _ONE > 0.0
    if not (to_nearest and subnormal):
        what = "flushes small numbers to zero" if to_nearest else "does not round to nearest"
        raise VmlabError(
            f"the host's floating-point unit {what} in this thread",
            hint="a library that was built with -ffast-math may have set that; do not preload it",
        )
