"""What an instruction's body may use of the processor that it runs on.

A body is written against `Cpu` alone. The reference executor implements it with numbers, the
generator of native code with operands; the operands of the present instruction, its registers,
memory, and the ways to leave it (a jump, a trap, a request to look for interrupts).

Not here: the layout of a hart's state, which is in vmlab.engine.cpu.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

from vmlab.engine.isa.values import Value


class Extension(Enum):
    """How a loaded datum fills its 64-bit register."""

    ZERO = "zero"
    SIGN = "sign"
    BOX = "box"  # the upper bits are ones: a narrow number in a wide floating-point register


class AtomicOperation(Enum):
    """Read-modify-write of memory; the name is LLVM's, but for the exchange's."""

    EXCHANGE = "xchg"
    ADD = "add"
    AND = "and"
    OR = "or"
    XOR = "xor"
    MAX = "max"
    MIN = "min"
    MAX_UNSIGNED = "umax"
    MIN_UNSIGNED = "umin"


class Cause(int, Enum):
    """Synchronous exceptions (RISC-V privileged 1.12, table 3.6)."""

    FETCH_MISALIGNED = 0
    FETCH_ACCESS = 1
    ILLEGAL = 2
    BREAKPOINT = 3
    LOAD_MISALIGNED = 4
    LOAD_ACCESS = 5
    STORE_MISALIGNED = 6
    STORE_ACCESS = 7
    CALL_FROM_USER = 8
    CALL_FROM_SUPERVISOR = 9
    CALL_FROM_MACHINE = 11
    FETCH_PAGE = 12
    LOAD_PAGE = 13
    STORE_PAGE = 15


class Trap(Exception):
    """The instruction does not retire; an exception is taken instead.

    Args:
        cause: what happened.
        value: what becomes of `mtval` or `stval`: an address, or 0.
    """

    def __init__(self, cause: Value | Cause, value: Value | int = 0) -> None:
        self.cause = Value(cause.value, 64) if isinstance(cause, Cause) else cause
        self.value = Value(value, 64) if isinstance(value, int) else value
        super().__init__(repr(self.cause), repr(self.value))


class Illegal(Trap):
    """The instruction is not valid here; the trap's value is the instruction itself."""

    def __init__(self) -> None:
        super().__init__(Cause.ILLEGAL)


class Cpu(ABC):
    """The processor, as the body of one instruction sees it."""

    # ---------------------------------------------------------------------- operands, registers

    @abstractmethod
    def field(self, name: str) -> Value:
        """An operand as it is encoded: rd, rs1, rs2, rs3 (64 bits wide, the register's number)."""

    @property
    @abstractmethod
    def imm(self) -> Value:
        """The immediate operand, extended to 64 bits."""

    @property
    @abstractmethod
    def pc(self) -> Value:
        """The address of this instruction."""

    @property
    @abstractmethod
    def next_pc(self) -> Value:
        """The address after this instruction."""

    @abstractmethod
    def read_register(self, operand: str, *, floating: bool = False) -> Value:
        """The register that an operand names."""

    @abstractmethod
    def write_register(self, value: Value, *, floating: bool = False) -> None:
        """Write the register that `rd` names; x0 stays 0."""

    @property
    def rs1(self) -> Value:
        """The first source register."""
        return self.read_register("rs1")

    @property
    def rs2(self) -> Value:
        """The second source register."""
        return self.read_register("rs2")

    @property
    def rd(self) -> Value:
        """The destination, which a body writes and never reads."""
        raise AttributeError("rd is written, not read")

    @rd.setter
    def rd(self, value: Value) -> None:
        self.write_register(value)

    @property
    def fs1(self) -> Value:
        """The first floating-point source register, all 64 bits."""
        return self.read_register("rs1", floating=True)

    @property
    def fs2(self) -> Value:
        """The second floating-point source register, all 64 bits."""
        return self.read_register("rs2", floating=True)

    @property
    def fs3(self) -> Value:
        """The third floating-point source register, all 64 bits."""
        return self.read_register("rs3", floating=True)

    @property
    def fd(self) -> Value:
        """The floating-point destination, which a body writes and never reads."""
        raise AttributeError("fd is written, not read")

    @fd.setter
    def fd(self, value: Value) -> None:
        self.write_register(value, floating=True)

    # ------------------------------------------------------------------------------------ memory

    @abstractmethod
    def load(self, address: Value, size: int, extension: Extension) -> Value:
        """Read `size` bytes of virtual memory into 64 bits. The body's last act but for `rd`.

        Raises:
            Trap: a page or access fault.
        """

    @abstractmethod
    def store(self, address: Value, size: int, value: Value) -> None:
        """Write the lowest `size` bytes of a value to virtual memory. The body's last act.

        Raises:
            Trap: a page or access fault.
        """

    @abstractmethod
    def atomic(self, operation: AtomicOperation, address: Value, size: int, value: Value) -> Value:
        """Read, modify and write memory at once; the old content, `size` bytes wide.

        Raises:
            Trap: misaligned, not memory, or a fault.
        """

    @abstractmethod
    def load_reserved(self, address: Value, size: int) -> Value:
        """Read memory and remember it for `store_conditional`; `size` bytes wide."""

    @abstractmethod
    def store_conditional(self, address: Value, size: int, value: Value) -> Value:
        """Write if the reservation holds: 0 where it did, 1 where not. It is gone either way."""

    @abstractmethod
    def zero_block(self, address: Value) -> None:
        """Write zeros to the cache block that holds the address (Zicboz)."""

    @abstractmethod
    def check_block(self, address: Value) -> None:
        """Trap as cache management of the block that holds the address would (Zicbom)."""

    @abstractmethod
    def fence(self) -> None:
        """Make memory accesses before this instruction visible to others before those after it."""

    # ------------------------------------------------------------------------------ control flow

    @abstractmethod
    def jump(self, target: Value) -> None:
        """Continue at an address; the body's last act, after which `rd` may not be written."""

    @abstractmethod
    def jump_relative(self, offset: Value) -> None:
        """Continue at `pc` plus the immediate operand, which `offset` must be."""

    # ----------------------------------------------------------------------------------- system

    @abstractmethod
    def system_call(self, name: str, *arguments: Value) -> Value:
        """Run a routine of the privileged architecture by name (vmlab.engine.cpu.system).

        Raises:
            Trap: as the routine says.
        """

    @abstractmethod
    def resume_at(self, target: Value) -> None:
        """Continue at an address after looking for interrupts and changes of address space."""

    @abstractmethod
    def wait(self) -> None:
        """Stop until an interrupt is pending; the body's last act."""
