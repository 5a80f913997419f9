"""The compile worker: a process that turns requests into objects until its input ends.

Messages on standard input and output: a length of four bytes, little-endian, and so many bytes.
A request is JSON: {"interpreter": "riscv64", "without": features of the processor that are not to
be used}, or {"module": IR text, "optimize": 0 to 3}. An answer begins with one byte, 0 or 1: after
0 comes the object, after 1 what went wrong, as text.
"""

from __future__ import annotations

import json
import sys
from typing import IO


def read_message(stream: IO[bytes]) -> bytes | None:
    """The next message, or None at the end of the stream.

    Raises:
        EOFError: the stream ends within a message.
    """
    head = stream.read(4)
    if not head:
        return None
    length = int.from_bytes(head, "little")
    body = stream.read(length)
    if len(head) < 4 or len(body) < length:
        raise EOFError("the stream ends within a message")
    return body


def write_message(stream: IO[bytes], body: bytes) -> None:
    """Send a message."""
    stream.write(len(body).to_bytes(4, "little") + body)
    stream.flush()


def _answer(request: bytes) -> bytes:
    from vmlab.engine.compile.interpreter import interpreter_text
    from vmlab.engine.compile.llvm import compile_text, host_fuses
    from vmlab.engine.isa.riscv64 import RISCV64

    wanted = json.loads(request)
    if "module" in wanted:
        return compile_text(wanted["module"], optimize=wanted["optimize"])
    if wanted.get("interpreter") != "riscv64":
        raise ValueError(f"nobody knows how to make {wanted}")
    without = wanted["without"]
    text = interpreter_text(RISCV64, host_fuses=host_fuses(without))
    return compile_text(text, without=without)


def main() -> None:
    """Answer requests."""
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    while (request := read_message(requests)) is not None:
        try:
            answer = b"\0" + _answer(request)
        except ValueError as error:
            answer = b"\1" + str(error).encode()
        write_message(answers, answer)


if __name__ == "__main__":
    main()
