"""Where an outside oracle is wrong, or of an older specification: by name, with the reason."""

from __future__ import annotations

QEMU_FAULTS = {
    "ctzw": "QEMU before 8.0 counts in all 64 bits: 33 for 1 << 33 (bitmanip 1.0.0, 2.11: 32)",
}
"""Instructions that programs for qemu-riscv64 7.2 are not made of."""

UNICORN_WITHOUT_BOXES = (
    "unicorn is of QEMU 5.0, which did not box the results of single precision "
    "(unprivileged 20191213, 12.2)"
)
"""Why the upper halves of single-precision results are not compared with unicorn's."""

UNICORN_FAULTS = dict.fromkeys(
    ("fmin.s", "fmax.s", "fmin.d", "fmax.d"),
    "in unicorn a signaling NaN beats a number (F 2.2, 11.6: the number is the result)",
)
"""Instructions that unicorn is not given a signaling NaN for."""
