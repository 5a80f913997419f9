"""The keys of a keyboard, by the names that QEMU has for them (QKeyCode in its ui.json).

They name places on the board, as on one with the US layout: what a guest makes of them is up to
the layout that it has loaded.
"""

from __future__ import annotations

from typing import Final

_LETTERS_AND_DIGITS: Final = "abcdefghijklmnopqrstuvwxyz0123456789"
_NAMED: Final = (
    "shift shift_r alt alt_r ctrl ctrl_r meta_l meta_r menu esc tab ret spc backspace caps_lock "
    "num_lock scroll_lock print sysrq pause insert delete home end pgup pgdn up down left right "
    "minus equal bracket_left bracket_right backslash semicolon apostrophe grave_accent comma dot "
    "slash less asterisk kp_divide kp_multiply kp_subtract kp_add kp_enter kp_decimal power sleep "
    "wake"
)

KEYS: Final = frozenset(
    {
        *_LETTERS_AND_DIGITS,
        *_NAMED.split(),
        *(f"f{number}" for number in range(1, 13)),
        *(f"kp_{number}" for number in range(10)),
    }
)
"""The names of the keys."""

KEYS_RULE: Final = 'names of keys, joined by a dash, such as "a", "ret", "shift-1" or "ctrl-alt-f2"'
