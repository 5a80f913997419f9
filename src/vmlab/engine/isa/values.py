"""The abstract value: a bit vector that is either a number or an operand of code being generated.

The meaning of instructions, traps and page walks is written once, over this type. Run with numbers
it is the reference executor; run with operands it emits LLVM IR through an `Emitter`. Where all
operands of an operation are numbers it is computed here and nothing is emitted, so that a partly
known program specialises itself.

`if value:` works for both: a number decides, an operand makes the emitter branch, and the function
that asked is run once for each answer (see vmlab.engine.compile.emitter).

Not here: memory, registers and control flow, which belong to the `Cpu` that a body is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Emitter(Protocol):
    """What generates code for values that are not known yet."""

    def operation(self, text: str) -> str:
        """Emit one LLVM instruction that has a result; return the result's name."""
        ...

    def decide(self, operand: str) -> bool:
        """Branch on an i1 operand; return which way the present run goes."""
        ...


def mask(width: int) -> int:
    """The number whose `width` lowest bits are set."""
    return (1 << width) - 1


def signed(bits: int, width: int) -> int:
    """The number that `width` bits mean in two's complement."""
    bits &= mask(width)
    return bits - (1 << width) if bits >> (width - 1) else bits


class Value:
    """`width` bits, known (`bits` is an int, never negative) or the name of an operand."""

    __slots__ = ("bits", "emitter", "width")

    def __init__(self, bits: int | str, width: int = 64, emitter: Emitter | None = None) -> None:
        self.bits = bits & ((1 << width) - 1) if isinstance(bits, int) else bits
        self.width = width
        self.emitter = emitter

    # ------------------------------------------------------------------------------- inspection

    @property
    def known(self) -> bool:
        """Whether the bits are a number."""
        return isinstance(self.bits, int)

    @property
    def number(self) -> int:
        """The bits as an unsigned number.

        Raises:
            ValueError: they are not known while code is generated.
        """
        if isinstance(self.bits, int):
            return self.bits
        raise ValueError(f"{self!r} is known only when the generated code runs")

    @property
    def signed_number(self) -> int:
        """The bits as a number in two's complement; raises as `number` does."""
        return signed(self.number, self.width)

    @property
    def text(self) -> str:
        """The operand as LLVM writes it, without its type."""
        return str(signed(self.bits, self.width)) if isinstance(self.bits, int) else self.bits

    @property
    def typed(self) -> str:
        """The operand as LLVM writes it, with its type."""
        return f"i{self.width} {self.text}"

    def __repr__(self) -> str:
        bits = f"{self.bits:#x}" if isinstance(self.bits, int) else self.bits
        return f"Value({bits}, {self.width})"

    def __bool__(self) -> bool:
        if isinstance(self.bits, int):
            return self.bits != 0
        condition = self if self.width == 1 else self.ne(0)
        assert condition.emitter is not None
        return condition.emitter.decide(condition.text)

    # ------------------------------------------------------------------------------- arithmetic

    def _like(self, other: Value | int) -> Value:
        if isinstance(other, int):
            return Value(other, self.width)
        if other.width != self.width:
            raise ValueError(f"widths differ: {self!r} and {other!r}")
        return other

    def _emit(self, text: str, width: int, *operands: Value) -> Value:
        for operand in (self, *operands):
            if operand.emitter is not None:
                return Value(operand.emitter.operation(text), width, operand.emitter)
        raise ValueError(f"no emitter for {text}")

    def _binary(
        self,
        opcode: str,
        other: Value | int,
        fold: Callable[[int, int], int],
        width: int | None = None,
    ) -> Value:
        right = self._like(other)
        if isinstance(self.bits, int) and isinstance(right.bits, int):
            return Value(fold(self.bits, right.bits), width or self.width)
        return self._emit(f"{opcode} {self.typed}, {right.text}", width or self.width, right)

    def __add__(self, other: Value | int) -> Value:
        right = self._like(other)
        if right.bits == 0:
            return self
        return right if self.bits == 0 else self._binary("add", right, lambda a, b: a + b)

    def __sub__(self, other: Value | int) -> Value:
        right = self._like(other)
        return self if right.bits == 0 else self._binary("sub", right, lambda a, b: a - b)

    def __mul__(self, other: Value | int) -> Value:
        return self._binary("mul", other, lambda a, b: a * b)

    def __and__(self, other: Value | int) -> Value:
        right = self._like(other)
        if right.bits == mask(self.width):
            return self
        return right if right.bits == 0 else self._binary("and", right, lambda a, b: a & b)

    def __or__(self, other: Value | int) -> Value:
        right = self._like(other)
        if right.bits == 0:
            return self
        return right if self.bits == 0 else self._binary("or", right, lambda a, b: a | b)

    def __xor__(self, other: Value | int) -> Value:
        right = self._like(other)
        return self if right.bits == 0 else self._binary("xor", right, lambda a, b: a ^ b)

    def __invert__(self) -> Value:
        return self ^ mask(self.width)

    def __neg__(self) -> Value:
        return Value(0, self.width) - self

    def __lshift__(self, amount: Value | int) -> Value:
        """Shift left; an amount of `width` or more has no meaning and must not occur."""
        right = self._like(amount)
        return self if right.bits == 0 else self._binary("shl", right, lambda a, b: a << b)

    def __rshift__(self, amount: Value | int) -> Value:
        """Shift right with zeros; an amount of `width` or more must not occur."""
        right = self._like(amount)
        return self if right.bits == 0 else self._binary("lshr", right, lambda a, b: a >> b)

    def shift_right_signed(self, amount: Value | int) -> Value:
        """Shift right with copies of the sign; an amount of `width` or more must not occur."""
        return self._binary("ashr", amount, lambda a, b: signed(a, self.width) >> b)

    def rotate_left(self, amount: Value | int) -> Value:
        """Rotate; the width must be a power of two, the amount is taken modulo it."""
        left = self._like(amount) & (self.width - 1)
        right = -left & (self.width - 1)
        return (self << left) | (self >> right)

    def divide_unsigned(self, other: Value | int) -> Value:
        """The quotient; the divisor must not be 0."""
        return self._binary("udiv", other, lambda a, b: a // b)

    def remainder_unsigned(self, other: Value | int) -> Value:
        """The remainder; the divisor must not be 0."""
        return self._binary("urem", other, lambda a, b: a % b)

    def divide_signed(self, other: Value | int) -> Value:
        """The quotient, rounded towards 0; neither a divisor of 0 nor an overflow may occur."""

        def fold(a: int, b: int) -> int:
            left, right = signed(a, self.width), signed(b, self.width)
            quotient = abs(left) // abs(right)
            return quotient if (left < 0) == (right < 0) else -quotient

        return self._binary("sdiv", other, fold)

    def remainder_signed(self, other: Value | int) -> Value:
        """The remainder with the dividend's sign; conditions as for `divide_signed`."""

        def fold(a: int, b: int) -> int:
            left, right = signed(a, self.width), signed(b, self.width)
            return abs(left) % abs(right) * (-1 if left < 0 else 1)

        return self._binary("srem", other, fold)

    # ------------------------------------------------------------------------------ comparisons

    def eq(self, other: Value | int) -> Value:
        """One bit: equal."""
        return self._binary("icmp eq", other, lambda a, b: a == b, 1)

    def ne(self, other: Value | int) -> Value:
        """One bit: different."""
        return self._binary("icmp ne", other, lambda a, b: a != b, 1)

    def below(self, other: Value | int) -> Value:
        """One bit: less, both taken as unsigned."""
        return self._binary("icmp ult", other, lambda a, b: a < b, 1)

    def less(self, other: Value | int) -> Value:
        """One bit: less, both taken as signed."""
        return self._binary(
            "icmp slt", other, lambda a, b: signed(a, self.width) < signed(b, self.width), 1
        )

    def select(self, then: Value | int, otherwise: Value | int) -> Value:
        """`then` where this single bit is set, else `otherwise`; both are computed.

        At least one of the two must be a Value, which gives the width.
        """
        if isinstance(then, int):
            assert isinstance(otherwise, Value)
            then = Value(then, otherwise.width)
        otherwise = then._like(otherwise)
        if isinstance(self.bits, int):
            return then if self.bits else otherwise
        if then.known and then.bits == otherwise.bits:
            return then
        return self._emit(
            f"select i1 {self.text}, {then.typed}, {otherwise.typed}", then.width, then, otherwise
        )

    # ----------------------------------------------------------------------------------- widths

    def _convert(self, opcode: str, width: int, fold: Callable[[int], int]) -> Value:
        if width == self.width:
            return self
        if isinstance(self.bits, int):
            return Value(fold(self.bits), width)
        return self._emit(f"{opcode} {self.typed} to i{width}", width)

    def zero_extend(self, width: int) -> Value:
        """As many bits as asked, the new ones zero."""
        return self._convert("zext", width, lambda a: a)

    def sign_extend(self, width: int) -> Value:
        """As many bits as asked, the new ones copies of the sign."""
        return self._convert("sext", width, lambda a: signed(a, self.width))

    def low(self, width: int) -> Value:
        """The lowest `width` bits."""
        return self._convert("trunc", width, lambda a: a)

    def bit(self, position: int) -> Value:
        """One bit of it."""
        return (self >> position).low(1)

    def bits_from(self, low: int, width: int) -> Value:
        """`width` bits from position `low` on."""
        return (self >> low).low(width)

    # ------------------------------------------------------------------------------ bit counting

    def _unary_intrinsic(self, name: str, extra: str, fold: Callable[[int], int]) -> Value:
        if isinstance(self.bits, int):
            return Value(fold(self.bits), self.width)
        return self._emit(
            f"call i{self.width} @llvm.{name}.i{self.width}({self.typed}{extra})", self.width
        )

    def count_ones(self) -> Value:
        """How many bits are set."""
        return self._unary_intrinsic("ctpop", "", int.bit_count)

    def count_leading_zeros(self) -> Value:
        """Zeros above the highest set bit; the width where none is set."""
        return self._unary_intrinsic("ctlz", ", i1 false", lambda a: self.width - a.bit_length())

    def count_trailing_zeros(self) -> Value:
        """Zeros below the lowest set bit; the width where none is set."""

        def fold(a: int) -> int:
            return (a & -a).bit_length() - 1 if a else self.width

        return self._unary_intrinsic("cttz", ", i1 false", fold)

    def swap_bytes(self) -> Value:
        """The bytes in the opposite order."""
        size = self.width // 8
        return self._unary_intrinsic(
            "bswap", "", lambda a: int.from_bytes(a.to_bytes(size, "little"), "big")
        )


def constant(bits: int, width: int = 64) -> Value:
    """A known value."""
    return Value(bits, width)
