"""The interrupt controllers' state and rules (RISC-V PLIC specification 1.0.0, ACLINT's MSWI).

One block of memory for all harts of a machine, and routines over it: for a hart's loads and stores
of the controllers' registers, for the lines that it polls, and for devices (by way of
vmlab.engine.devices.plic and .aclint). No hart leaves to its host to claim or to complete an
interrupt, nor, where the host has futexes, to interrupt another hart.

The block is an array of 64-bit words. Of PENDING, LEVEL, SERVICE and a context's ENABLE each word
has 32 sources. Who changes them holds the block's lock; lines are not stored but found out when
they are polled, so that they never lag behind. MSWI's levels are a word each, for which nobody
needs the lock. A hart that does not get the lock at once, or whose
store may raise a line that other harts sleep for, leaves it to the host.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Callable, Mapping

from vmlab.engine.cpu import layout
from vmlab.engine.cpu.core import Core, DeviceCore, Routine, routine
from vmlab.engine.cpu.layout import (
    ASLEEP_TOLD,
    ASLEEP_WAITS,
    HARTID,
    INTERRUPTS,
    MIP,
    SHARED_ASLEEP,
    SHARED_SOFTWARE,
)
from vmlab.engine.isa.values import Value, mask
from vmlab.engine.memory.pages import own_memory

SIZE = 0x60_0000
SOURCES = 96
"""Interrupt sources 1 to 96, as the board's device tree says (`riscv,ndev`)."""
WORDS = 4  # for sources 0 to 127, of which those that do not exist are never set

# Words of the block.
LOCK = 0  # 1: held
BASE = 1  # physical address of the registers; NOWHERE where the host wants to see each access
CONTEXTS = 2
TOLD = 3  # 1: the host wants to see every call of firmware
PENDING, LEVEL, SERVICE = 4, 8, 12
PRIORITY = 16  # one per source
STATUS_ADDRESS = 120  # physical address of the UART's line status, or NOWHERE
STATUS = 121  # what it reads as; UNKNOWN where reading changes something
MSWI_BASE = 122  # physical address of MSWI's registers; NOWHERE as for BASE
CONTEXT = 128  # from here on CONTEXT_WORDS each: ENABLE, then the threshold
CONTEXT_WORDS = 8
# Of a context's words.
THRESHOLD = 4
SHARED_ADDRESS = 5  # of its hart's shared words, in the context of M mode
SOFTWARE = 6  # in the context of M mode: MSWI's register of its hart, 0 or 1
NOWHERE = 1 << 63  # physical addresses have 56 bits, and no registers reach around to them
UNKNOWN = mask(64)

BUSY = 1 << 63  # the answer where the lock is not to be had, or the host has to do it

# Registers, as distances from BASE.
_PENDING_REGISTERS = 0x1000
_ENABLE_REGISTERS, _ENABLE_SHIFT = 0x2000, 7
_CONTEXT_REGISTERS, _CONTEXT_SHIFT = 0x20_0000, 12
_HIGHEST_PRIORITY = 7
_WORD = 0xFFFF_FFFF

SSIP, MSIP, SEIP, MEIP = 1, 3, 9, 11  # bits of mip


class InterruptBlock:
    """The state of the controller of a machine with `harts` harts.

    Two contexts for each hart, M mode's and S mode's, as on QEMU's "virt" board.

    Args:
        harts: how many.

    Attributes:
        native: the native functions of HOST_ROUTINES, by name, where harts run native code; they
            take the address of a state block and two numbers.
        software: MSWI's registers.
    """

    def __init__(self, harts: int) -> None:
        self.contexts = 2 * harts
        self._memories: list[mmap.mmap] = []
        self.words, self.address = self._new(CONTEXT + CONTEXT_WORDS * self.contexts)
        self.words[BASE] = self.words[STATUS_ADDRESS] = self.words[MSWI_BASE] = NOWHERE
        self.software = self.words[CONTEXT + SOFTWARE :: 2 * CONTEXT_WORDS]
        self.words[CONTEXTS] = self.contexts
        # Native code finds the block by a hart's state; the host's calls have one of their own.
        state, self._state_address = self._new(layout.STATE_SIZE // 8)
        state[layout.INTERRUPTS.index] = self.address
        self.lock = threading.Lock()  # instead of the word, where nobody but Python comes
        self.native: Mapping[str, Callable[[int, int, int], int]] = {}
        self.shared: dict[int, memoryview] = {}  # the harts' shared words

    def join(self, hart: int, shared: memoryview, address: int) -> None:
        """A hart polls this controller; where the words are that it shares."""
        self.shared[hart] = shared
        self.words[CONTEXT + CONTEXT_WORDS * 2 * hart + SHARED_ADDRESS] = address

    def _new(self, words: int) -> tuple[memoryview, int]:
        memory = own_memory(-(-8 * words // mmap.PAGESIZE) * mmap.PAGESIZE)
        self._memories.append(memory)
        return memoryview(memory).cast("Q"), ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def perform(self, operation: Callable[..., Value], *arguments: int) -> int:
        """Do one of HOST_ROUTINES."""
        while True:
            if self.native:
                first, second = (*arguments, 0)[:2]
                answer = self.native[operation.__name__](self._state_address, first, second)
            else:
                answer = operation(BlockCore(self), *map(Value, arguments)).number
            if answer != BUSY:
                return answer
            time.sleep(0)


class BlockCore(DeviceCore):
    """A block in numbers.

    Args:
        block: which.
    """

    def __init__(self, block: InterruptBlock) -> None:
        self.block = block

    def device_word(self, index: Value) -> Value:
        return Value(self.block.words[index.number], 64)

    def set_device_word(self, index: Value, value: Value) -> None:
        self.block.words[index.number] = value.number

    def post_device_word(self, index: Value, value: Value) -> None:
        self.set_device_word(index, value)

    def lock_devices(self) -> Value:
        return Value(int(self.block.lock.acquire()), 1)

    def unlock_devices(self) -> None:
        self.block.lock.release()

    def call(self, routine: Routine, *arguments: Value) -> Value:
        return routine.body(self, *arguments)


def _enable(context: Value) -> Value:
    """Where a context's words begin."""
    return context * CONTEXT_WORDS + CONTEXT


def shared_place(hart: Value) -> Value:
    """The word that says where a hart's shared words are."""
    return _enable(hart << 1) + SHARED_ADDRESS


def _place(source: Value, words: int | Value) -> tuple[Value, Value]:
    """The word of a source, and its bit there."""
    return (source >> 5) + words, Value(1, 64) << (source & 31)


@routine()
def best_among(core: DeviceCore, candidates: Value, first: Value, best: Value) -> Value:
    """The best of `best` and 32 sources from `first` on: priority, and 255 less its number."""
    if candidates.eq(0):
        return best
    source = candidates.count_trailing_zeros() + first
    priority = core.device_word(source + PRIORITY)
    rank = (priority << 8) | (Value(255, 64) - source)
    better = priority.ne(0) & best.below(rank)
    return best_among(core, candidates & (candidates - 1), first, better.select(rank, best))


@routine()
def best_source(core: DeviceCore, context: Value) -> Value:
    """The best pending source of a context, ranked as in `best_among`; 0 for none."""
    best, enable = Value(0, 64), _enable(context)
    for word in range(WORDS):
        candidates = core.device_word(Value(PENDING + word, 64)) & core.device_word(enable + word)
        best = best_among(core, candidates, Value(32 * word, 64), best)
    return best


def _anything_pending(core: DeviceCore) -> Value:
    words = [core.device_word(Value(PENDING + word, 64)) for word in range(WORDS)]
    return (words[0] | words[1] | words[2] | words[3]).ne(0)


@routine()
def context_line(core: DeviceCore, context: Value) -> Value:
    """1 where a context's line is high."""
    threshold = core.device_word(_enable(context) + THRESHOLD)
    return threshold.below(best_source(core, context) >> 8).zero_extend(64)


@routine()
def controlled_lines(core: Core) -> Value:
    """The bits of mip that the controllers drive for this hart."""
    if core[INTERRUPTS].eq(0):
        return Value(0, 64)
    machine = core[HARTID] << 1
    software = core.device_word(_enable(machine) + SOFTWARE) << MSIP
    if ~_anything_pending(core):
        return software
    external = (context_line(core, machine) << MEIP) | (context_line(core, machine + 1) << SEIP)
    return software | external


# --------------------------------------------------------------------- interrupts between harts


@routine()
def note_software_interrupt(core: Core) -> Value:
    """Set SSIP if another hart has asked for it."""
    if core.shared(SHARED_SOFTWARE).ne(0):
        core.take_shared(SHARED_SOFTWARE)
        core[MIP] = core[MIP] | 1 << SSIP
    return Value(0, 64)


@routine()
def awaken(core: Core, hart: Value) -> Value:
    """1 where a hart is awake, or is now; 0 where the host has to wake it."""
    asleep = core.shared_of(hart, SHARED_ASLEEP)
    if asleep.eq(ASLEEP_WAITS):
        core.rouse(hart)
    return asleep.ne(ASLEEP_TOLD).zero_extend(64)


@routine()
def interrupt_harts(core: Core, harts: Value, first: Value, awake: Value) -> Value:
    """Ask harts to set SSIP; `awake`, or 0 where the host has to wake one of them.

    Args:
        core: who asks.
        harts: a bit for each, from `first` on.
        first: a hart.
        awake: 1, at first.
    """
    if harts.eq(0):
        return awake
    hart = harts.count_trailing_zeros() + first
    core.post(hart, SHARED_SOFTWARE)
    return interrupt_harts(core, harts & (harts - 1), first, awake & awaken(core, hart))


@routine()
def are_harts(core: Core, harts: Value, first: Value) -> Value:
    """1 where a call of firmware names harts that there are, and the host need not be told."""
    if core[INTERRUPTS].eq(0):
        return Value(0, 64)
    if core.device_word(Value(TOLD, 64)).ne(0):
        return Value(0, 64)
    count = core.device_word(Value(CONTEXTS, 64)) >> 1
    if ~first.below(count):
        return Value(0, 64)
    left = count - first
    none = left.below(64) & (harts >> (left & 63)).ne(0)
    return (~none).zero_extend(64)


@routine()
def send_software_interrupts(core: Core, harts: Value, first: Value) -> Value:
    """1 where that was all of `sbi_send_ipi`; 0 where the host has to do it, or to do it again."""
    if are_harts(core, harts, first).eq(0):
        return Value(0, 64)
    return interrupt_harts(core, harts, first, Value(1, 64))


@routine()
def store_software(core: Core, physical: Value, value: Value) -> Value:
    """A hart's store of four bytes; BUSY if none of MSWI's registers, or the host's to do.

    A hart that interrupts itself takes that at once: it has to come to a poll, and by the host it
    does.
    """
    hart = (physical - core.device_word(Value(MSWI_BASE, 64))) >> 2
    if ~hart.below(core.device_word(Value(CONTEXTS, 64)) >> 1):
        return Value(BUSY, 64)
    level = value & 1
    if level.ne(0) & hart.eq(core[HARTID]):
        return Value(BUSY, 64)
    core.post_device_word(_enable(hart << 1) + SOFTWARE, level)
    if level.eq(0):
        return level
    return awaken(core, hart).ne(0).select(Value(0, 64), BUSY)


# ------------------------------------------------------------------------- what is done to sources


@routine()
def set_source_level(core: DeviceCore, source: Value, level: Value) -> Value:
    """Drive a source's line; 1 where it became pending. The lock is held."""
    place, bit = _place(source, LEVEL)
    old = core.device_word(place)
    core.set_device_word(place, level.ne(0).select(old | bit, old & ~bit))
    # The gateway has sent its request already; a level that falls does not recall it. Nor does
    # one that stays send another.
    rises = level.ne(0) & (old & bit).eq(0)
    serving = (core.device_word(place + (SERVICE - LEVEL)) & bit).ne(0)
    forwarded = (rises & ~serving).select(bit, 0)
    pending = place - (LEVEL - PENDING)
    core.set_device_word(pending, core.device_word(pending) | forwarded)
    return forwarded.ne(0).zero_extend(64)


@routine()
def claim(core: DeviceCore, context: Value) -> Value:
    """Take the best pending source, whatever the threshold; 0 if there is none. Lock held."""
    best = best_source(core, context)
    if best.eq(0):
        return best
    source = Value(255, 64) - (best & 255)
    place, bit = _place(source, PENDING)
    core.set_device_word(place, core.device_word(place) & ~bit)
    serving = place + (SERVICE - PENDING)
    core.set_device_word(serving, core.device_word(serving) | bit)
    return source


@routine()
def complete(core: DeviceCore, context: Value, source: Value) -> Value:
    """The handler of a source is through; ignored unless the context has it enabled. Lock held."""
    if Value(SOURCES - 1, 64).below(source - 1):
        return Value(0, 64)
    enable, bit = _place(source, _enable(context))
    if (core.device_word(enable) & bit).eq(0):
        return Value(0, 64)
    serving = (source >> 5) + SERVICE
    core.set_device_word(serving, core.device_word(serving) & ~bit)
    pending = serving - (SERVICE - PENDING)
    again = core.device_word(serving - (SERVICE - LEVEL)) & bit
    core.set_device_word(pending, core.device_word(pending) | again)
    return Value(0, 64)


# --------------------------------------------------------------------------------------- registers


def _sources_of(word: Value) -> Value:
    """The bits of a word of 32 sources that stand for one; source 0 does not exist."""
    last = word.eq(WORDS - 1).select(Value(1, 64), _WORD)
    return word.eq(0).select(Value(_WORD - 1, 64), last)


@routine()
def read_register(core: DeviceCore, offset: Value) -> Value:
    """A register of 32 bits; what is not there reads as zero. The lock is held."""
    contexts = core.device_word(Value(CONTEXTS, 64))
    if offset.below(4 * (SOURCES + 1)):
        return core.device_word((offset >> 2) + PRIORITY)
    if (offset - _PENDING_REGISTERS).below(4 * WORDS):
        return core.device_word(((offset - _PENDING_REGISTERS) >> 2) + PENDING)
    enables = offset - _ENABLE_REGISTERS
    if enables.below(contexts << _ENABLE_SHIFT):
        word = (enables & mask(_ENABLE_SHIFT)) >> 2
        if word.below(WORDS):
            return core.device_word(_enable(enables >> _ENABLE_SHIFT) + word)
        return Value(0, 64)
    rest = offset - _CONTEXT_REGISTERS
    if rest.below(contexts << _CONTEXT_SHIFT):
        context, register = rest >> _CONTEXT_SHIFT, rest & mask(_CONTEXT_SHIFT)
        if register.eq(0):
            return core.device_word(_enable(context) + THRESHOLD)
        if register.eq(4):
            return claim(core, context)
    return Value(0, 64)


@routine()
def write_register(core: DeviceCore, offset: Value, value: Value) -> Value:
    """Write a register of 32 bits; what is not there is not written. The lock is held."""
    contexts = core.device_word(Value(CONTEXTS, 64))
    if offset.below(4 * (SOURCES + 1)):
        if offset.ne(0):
            core.set_device_word((offset >> 2) + PRIORITY, value & _HIGHEST_PRIORITY)
        return Value(0, 64)
    enables = offset - _ENABLE_REGISTERS
    if enables.below(contexts << _ENABLE_SHIFT):
        word = (enables & mask(_ENABLE_SHIFT)) >> 2
        if word.below(WORDS):
            place = _enable(enables >> _ENABLE_SHIFT) + word
            core.set_device_word(place, value & _sources_of(word))
        return Value(0, 64)
    rest = offset - _CONTEXT_REGISTERS
    if rest.below(contexts << _CONTEXT_SHIFT):
        context, register = rest >> _CONTEXT_SHIFT, rest & mask(_CONTEXT_SHIFT)
        if register.eq(0):
            core.set_device_word(_enable(context) + THRESHOLD, value & _HIGHEST_PRIORITY)
        elif register.eq(4):
            return complete(core, context, value)
    return Value(0, 64)


@routine()
def raises_nothing(core: DeviceCore, offset: Value, value: Value) -> Value:
    """1 where no line is higher after a write than before. The lock is held."""
    rest = offset - _CONTEXT_REGISTERS
    completes = ~offset.below(_CONTEXT_REGISTERS) & (rest & mask(_CONTEXT_SHIFT)).eq(4)
    if completes:
        if ~value.below(SOURCES + 1):
            return Value(1, 64)
        place, bit = _place(value, LEVEL)
        return (core.device_word(place) & bit).eq(0).zero_extend(64)
    return (~_anything_pending(core)).zero_extend(64)


# -------------------------------------------------------------- for harts, devices and the host


@routine()
def load_register(core: DeviceCore, offset: Value) -> Value:
    """A hart's load, or BUSY."""
    if ~core.lock_devices():
        return Value(BUSY, 64)
    value = read_register(core, offset)
    core.unlock_devices()
    return value


@routine()
def store_register(core: DeviceCore, offset: Value, value: Value) -> Value:
    """A hart's store; BUSY if the host has to do it."""
    if ~core.lock_devices():
        return Value(BUSY, 64)
    if raises_nothing(core, offset, value).eq(0):
        core.unlock_devices()
        return Value(BUSY, 64)
    write_register(core, offset, value)
    core.unlock_devices()
    return Value(0, 64)


@routine()
def host_store_register(core: DeviceCore, offset: Value, value: Value) -> Value:
    """The host's store of a register, or BUSY; lines may rise."""
    if ~core.lock_devices():
        return Value(BUSY, 64)
    write_register(core, offset, value)
    core.unlock_devices()
    return Value(0, 64)


@routine()
def drive_source(core: DeviceCore, source: Value, level: Value) -> Value:
    """A device drives its line: 1 where it became pending; or BUSY."""
    if ~core.lock_devices():
        return Value(BUSY, 64)
    rose = set_source_level(core, source, level)
    core.unlock_devices()
    return rose


HOST_ROUTINES = (load_register, host_store_register, drive_source)
"""What the host does to the block; each takes at most two values."""


def line_status(core: DeviceCore, physical: Value) -> Value:
    """What the UART's line status reads as, if that is at this address; else UNKNOWN."""
    here = core.device_word(Value(STATUS_ADDRESS, 64)).eq(physical)
    return here.select(core.device_word(Value(STATUS, 64)), UNKNOWN)


def register_offset(core: DeviceCore, physical: Value) -> Value:
    """The distance of an address from the registers; SIZE or more for what is none of them."""
    return physical - core.device_word(Value(BASE, 64))
