"""LLVM IR as text, from Python functions over abstract values.

`if value:` in such a function asks the emitter to branch. The function is run once for each way
through it: a run repeats the answers that lead to a branch not yet explored, during which nothing
is emitted a second time, and explores on from there. What comes out is a tree of basic blocks; two
ways never join again, so a function that has to join does so by calling routines.

Not here: llvmlite; this module only writes text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from vmlab.engine.isa.values import Value

LIKELY, UNLIKELY = "!prof !0", "!prof !1"
METADATA = """
!0 = !{!"branch_weights", i32 2000, i32 1}
!1 = !{!"branch_weights", i32 1, i32 2000}
"""


@dataclass
class _Block:
    label: str
    lines: list[str] = field(default_factory=list)
    then: _Block | None = None
    otherwise: _Block | None = None
    count: int = 0  # names given out in the present run


class FunctionEmitter:
    """Collects the body of one function."""

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._root = self._new_block()
        self._block = self._root
        self._answers: list[bool] = []
        self._position = 0
        self._unexplored: list[list[bool]] = []

    def _new_block(self) -> _Block:
        self._blocks.append(_Block(f"b{len(self._blocks)}"))
        return self._blocks[-1]

    @property
    def _repeating(self) -> bool:
        return self._block.then is not None

    def operation(self, text: str) -> str:
        """Emit an instruction with a result; its name."""
        block = self._block
        name = f"%{block.label}.{block.count}"
        block.count += 1
        if not self._repeating:
            block.lines.append(f"{name} = {text}")
        return name

    def effect(self, text: str) -> None:
        """Emit an instruction without a result."""
        if not self._repeating:
            self._block.lines.append(text)

    def value(self, text: str, width: int = 64) -> Value:
        """Emit an instruction whose result is a value of this width."""
        return Value(self.operation(text), width, self)

    def decide(self, operand: str, weight: str = "") -> bool:
        """Branch; see the module's head.

        Args:
            operand: an i1.
            weight: LIKELY, UNLIKELY or nothing.
        """
        block = self._block
        if block.then is None or block.otherwise is None:
            then, otherwise = self._new_block(), self._new_block()
            hint = f", {weight}" if weight else ""
            block.lines.append(
                f"br i1 {operand}, label %{then.label}, label %{otherwise.label}{hint}"
            )
            block.then, block.otherwise = then, otherwise
        if self._position < len(self._answers):
            answer = self._answers[self._position]
        else:
            answer = True
            self._unexplored.append([*self._answers, False])
            self._answers.append(True)
        self._position += 1
        self._block = block.then if answer else block.otherwise
        self._block.count = 0
        return answer

    def likely(self, condition: Value) -> bool:
        """Branch on one bit that is nearly always set."""
        return bool(condition) if condition.known else self.decide(condition.text, LIKELY)

    def unlikely(self, condition: Value) -> bool:
        """Branch on one bit that is hardly ever set."""
        return bool(condition) if condition.known else self.decide(condition.text, UNLIKELY)

    def explore(self, body: Callable[[], None]) -> None:
        """Run a body in all ways through it. Each way must end with a terminator."""
        self._unexplored = [[]]
        while self._unexplored:
            self._answers = self._unexplored.pop()
            self._position = 0
            self._block = self._root
            self._block.count = 0
            body()

    def text(self, header: str) -> str:
        """The function, given everything up to its opening brace."""
        blocks = "\n".join(
            f"{block.label}:\n  " + "\n  ".join(block.lines) for block in self._blocks
        )
        return f"{header} {{\n{blocks}\n}}\n"
