"""RV64GC with the extensions that the engine's guests are told of."""

from __future__ import annotations

from vmlab.engine.isa.encoding import InstructionSet
from vmlab.engine.isa.riscv64.atomic import atomic
from vmlab.engine.isa.riscv64.base import base
from vmlab.engine.isa.riscv64.bits import address_bits, basic_bits, single_bits
from vmlab.engine.isa.riscv64.compressed import compressed
from vmlab.engine.isa.riscv64.floating import double, single
from vmlab.engine.isa.riscv64.multiply import multiply
from vmlab.engine.isa.riscv64.system import (
    cache_blocks,
    cache_zero,
    csr,
    instruction_fence,
    invalidation,
    privileged,
)

RISCV64 = InstructionSet(
    base,
    multiply,
    atomic,
    single,
    double,
    compressed,
    csr,
    instruction_fence,
    privileged,
    invalidation,
    address_bits,
    basic_bits,
    single_bits,
    cache_blocks,
    cache_zero,
)
