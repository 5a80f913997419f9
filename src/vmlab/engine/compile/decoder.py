"""The native decoder: from code to decode records, made from the instruction set's patterns.

`decode` makes one record; `decode_page` makes a page's, one for each halfword whether or not an
instruction begins there, so that nobody has to know where they do. A branch out of the page gets
the handler for any target, and a 32-bit instruction that begins with the page's last halfword gets
one that fetches it anew.
"""

from __future__ import annotations

from vmlab.engine.compile.native import ATTRIBUTES
from vmlab.engine.cpu.layout import DISCARD
from vmlab.engine.isa.encoding import Instruction, InstructionSet
from vmlab.engine.isa.values import Value


class _DecoderWriter:
    """Writes the decision tree of `decode`; a branch per field that tells instructions apart."""

    def __init__(self, instructions: InstructionSet, handlers: list[str]) -> None:
        self.instructions = instructions
        self.numbers = {name: number for number, name in enumerate(handlers)}
        self.lines: list[str] = []
        self.labels = 0

    def label(self) -> str:
        self.labels += 1
        return f"L{self.labels}"

    def name(self) -> str:
        self.labels += 1
        return f"%n{self.labels}"

    def operation(self, text: str) -> str:
        """As vmlab.engine.isa.values.Emitter says."""
        name = self.name()
        self.lines.append(f"  {name} = {text}")
        return name

    def decide(self, operand: str) -> bool:
        """Operands are extracted without asking."""
        raise AssertionError(f"an operand's extraction branches on {operand}")

    # --------------------------------------------------------------------------------- the tree

    def tree(self, label: str, choices: list[Instruction], tested: int) -> None:
        """Write the block `label`, where the bits `tested` of the word are known to fit."""
        self.lines.append(f"{label}:")
        common = ~tested & 0xFFFF_FFFF
        for choice in choices:
            common &= choice.pattern.fixed_mask
        if common == 0 or len(choices) == 1:
            self.candidates(choices, tested)
            return
        # The lowest run of bits that all of them have fixed.
        low = (common & -common).bit_length() - 1
        width = (~(common >> low) & (common >> low) + 1).bit_length() - 1
        field = ((1 << width) - 1) << low
        cases: dict[int, list[Instruction]] = {}
        for choice in choices:
            cases.setdefault((choice.pattern.fixed_bits & field) >> low, []).append(choice)
        shifted = self.operation(f"lshr i32 %word, {low}")
        selector = self.operation(f"and i32 {shifted}, {(1 << width) - 1}")
        labels = {value: self.label() for value in cases}
        table = " ".join(f"i32 {value}, label %{labels[value]}" for value in cases)
        self.lines.append(f"  switch i32 {selector}, label %illegal [ {table} ]")
        for value, chosen in cases.items():
            self.tree(labels[value], chosen, tested | field)

    def candidates(self, choices: list[Instruction], tested: int) -> None:
        """Try instructions one after the other."""
        for choice in choices:
            fits, otherwise = self.label(), self.label()
            conditions = []
            rest = choice.pattern.fixed_mask & ~tested
            if rest:
                masked = self.operation(f"and i32 %word, {rest}")
                conditions.append(
                    self.operation(f"icmp eq i32 {masked}, {choice.pattern.fixed_bits & rest}")
                )
            word = Value("%word", 32, self)
            for operand, excluded in choice.without:
                value = choice.pattern.operands[operand].extract(word)
                conditions.append(value.ne(excluded).text)
            condition = "true"
            for part in conditions:
                condition = self.operation(f"and i1 {condition}, {part}")
            self.lines.append(f"  br i1 {condition}, label %{fits}, label %{otherwise}")
            self.lines.append(f"{fits}:")
            self.leaf(choice)
            self.lines.append(f"{otherwise}:")
        self.lines.append("  br label %illegal")

    def leaf(self, instruction: Instruction) -> None:
        """Write an instruction's record."""
        base = self.instructions[instruction.base or instruction.name]
        word = Value("%word", 32, self)
        operands = {
            name: instruction.operand(name, word) for name in ("rd", "rs1", "rs2", "rs3", "imm")
        }
        if not base.assembly.startswith("fd"):
            operands["rd"] = operands["rd"].eq(0).select(DISCARD, operands["rd"])
        packed = Value(0, 32)
        for place, name in enumerate(("rd", "rs1", "rs2", "rs3")):
            packed = packed | (operands[name] << (8 * place))
        name = f"{base.name}.{instruction.pattern.length}"
        number = str(self.numbers[name])
        near = self.numbers.get(name + ".near")
        if near is not None:
            target = Value("%offset", 64, self) + operands["imm"].sign_extend(64)
            number = target.below(4096).select(Value(near, 32), int(number)).text
        self.record(number, operands["imm"].text, packed.text)

    def record(self, number: str, imm: str, packed: str) -> None:
        """Store a record and return."""
        index = self.operation(f"zext i32 {number} to i64")
        slot = self.operation(f"getelementptr ptr, ptr %handlers, i64 {index}")
        handler = self.operation(f"load ptr, ptr {slot}")
        imm_pointer = self.operation("getelementptr i8, ptr %record, i64 8")
        packed_pointer = self.operation("getelementptr i8, ptr %record, i64 12")
        self.lines += [
            f"  store i32 {imm}, ptr {imm_pointer}",
            f"  store i32 {packed}, ptr {packed_pointer}",
            f"  store ptr {handler}, ptr %record",
            "  ret void",
        ]


def decoder_text(instructions: InstructionSet, handlers: list[str]) -> str:
    """`decode(word, record, offset in the page, handlers)` and `decode_page` as LLVM IR.

    Args:
        instructions: what there is to decode.
        handlers: the names of the handlers by number.
    """
    writer = _DecoderWriter(instructions, handlers)
    short = [one for one in instructions if one.pattern.length == 2]
    long = [one for one in instructions if one.pattern.length == 4]
    writer.lines += [
        "entry:",
        "  %low = and i32 %word, 3",
        "  %is.long = icmp eq i32 %low, 3",
        "  br i1 %is.long, label %long, label %short",
    ]
    writer.tree("long", long, 3)
    writer.tree("short", short, 0)
    writer.lines.append("illegal:")
    # The trap's value is the instruction, of which a short one has only 16 bits.
    writer.lines += [
        "  %half = and i32 %word, 65535",
        "  %shown = select i1 %is.long, i32 %word, i32 %half",
    ]
    writer.record(str(writer.numbers["illegal"]), "%shown", "0")
    header = (
        "define internal fastcc void @decode(i32 %word, ptr %record, i64 %offset, ptr %handlers) "
    )
    body = "\n".join(writer.lines)
    crossing = writer.numbers["crossing"]
    page = f"""
define hidden void @decode_page(ptr %code, ptr %records, ptr %handlers) {ATTRIBUTES} {{
entry:
  br label %loop
loop:
  %offset = phi i64 [0, %entry], [%next, %loop]
  %source = getelementptr i8, ptr %code, i64 %offset
  %place = shl i64 %offset, 3
  %record = getelementptr i8, ptr %records, i64 %place
  %word = load i32, ptr %source, align 1
  call fastcc void @decode(i32 %word, ptr %record, i64 %offset, ptr %handlers)
  %next = add i64 %offset, 2
  %more = icmp ult i64 %next, 4094
  br i1 %more, label %loop, label %last
last:
  %end = getelementptr i8, ptr %code, i64 4094
  %half = load i16, ptr %end, align 1
  %final = zext i16 %half to i32
  %final.record = getelementptr i8, ptr %records, i64 32752
  %kind = and i32 %final, 3
  %crosses = icmp eq i32 %kind, 3
  br i1 %crosses, label %crossing, label %short
crossing:
  %slot = getelementptr ptr, ptr %handlers, i64 {crossing}
  %handler = load ptr, ptr %slot
  store ptr %handler, ptr %final.record
  ret void
short:
  call fastcc void @decode(i32 %final, ptr %final.record, i64 4094, ptr %handlers)
  ret void
}}
"""
    return f"{header}{ATTRIBUTES} {{\n{body}\n}}\n{page}"
