"""The kernel's own table of symbols, in the orders that kernels have had it in."""

from __future__ import annotations

import io
import struct

import pytest
from elftools.elf.elffile import ELFFile

from vmlab.engine.debug.kallsyms import Symbol, SymbolTable, kernel_symbols, symbol_file, symbols_in
from vmlab.engine.memory.ram import Ram

BASE = 0xFFFF_FFFF_8000_0000
NAMES = [f"T{'do_' if number % 3 else ''}function_{number}" for number in range(700)]
NAMES[5] = "D" + "long_name_" * 20
SYMBOLS = [Symbol(BASE + 16 * number, name[1:], name[0]) for number, name in enumerate(NAMES)]
TOKENS = [chr(code) if 32 < code < 127 else f"token{code}" for code in range(256)]
TOKENS[1] = "function_"
TOKENS[2] = "do_"


def _aligned(data: bytes) -> bytes:
    return data + bytes(-len(data) % 8)


def _stored(name: str) -> bytes:
    """A name with its length in front, in tokens."""
    data = bytearray()
    while name:
        token = next((code for code in (1, 2) if name.startswith(TOKENS[code])), None)
        data.append(ord(name[0]) if token is None else token)
        name = name[1 if token is None else len(TOKENS[token]) :]
    size = len(data)
    head = bytes((size,)) if size < 128 else bytes((size & 0x7F | 0x80, size >> 7))
    return head + data


def image(*, modern: bool, base: int = BASE) -> bytes:
    """A kernel with that table at some place, as scripts/kallsyms.c writes it."""
    names, markers = bytearray(), []
    for number, name in enumerate(NAMES):
        if number % 256 == 0:
            markers.append(len(names))
        names += _stored(name)
    table, index = bytearray(), []
    for token in TOKENS:
        index.append(len(table))
        table += token.encode() + b"\0"
    offsets = _aligned(b"".join(struct.pack("<I", 16 * number) for number in range(len(NAMES))))
    addresses = offsets + struct.pack("<Q", base)
    number = struct.pack("<Q", len(NAMES))
    rest = _aligned(bytes(names)) + _aligned(struct.pack(f"<{len(markers)}I", *markers))
    rest += _aligned(bytes(table)) + _aligned(struct.pack("<256H", *index))
    body = number + rest + addresses if modern else addresses + number + rest
    # Digits that are no table's come before.
    digits = b"".join(b"%d\0" % digit for digit in range(10))
    return _aligned(b"code" * 100 + digits) + body + bytes(64)


@pytest.mark.parametrize("modern", [True, False])
def test_symbols_are_found_in_a_kernel(modern: bool) -> None:
    assert kernel_symbols(image(modern=modern)).symbols == SYMBOLS


def test_addresses_are_those_that_the_kernel_has_now() -> None:
    moved = BASE + 0x2A0_0000
    assert kernel_symbols(image(modern=True, base=moved)).symbols[1].address == moved + 16


def test_there_may_be_no_symbols() -> None:
    assert len(kernel_symbols(b"nothing" * 1000)) == 0
    whole = image(modern=True)
    for end in range(500, len(whole) - 64, 997):
        assert len(kernel_symbols(whole[:end])) in (0, len(NAMES)), end
    assert symbol_file(kernel_symbols(b"")) == b""


def test_they_are_found_where_firmware_puts_kernels() -> None:
    ram = Ram(8 << 20)
    ram.load_image(ram.base + 0x20_0000, image(modern=True))
    assert len(symbols_in(ram)) == len(NAMES)
    ram.close()
    small = Ram(1 << 20)
    assert len(symbols_in(small)) == 0
    small.close()


def test_an_address_is_told_by_the_symbol_before_it() -> None:
    table = SymbolTable(SYMBOLS)
    assert table.shown(BASE + 17) == "do_function_1+0x1"
    assert table.shown(BASE) == "function_0"
    assert table.shown(BASE - 1) == ""
    assert table.shown(SYMBOLS[-1].address) == "function_699"
    assert table.shown(SYMBOLS[-1].address + 1) == ""
    found = table.find("do_function_2")
    assert found is not None
    assert found.address == BASE + 32


def test_the_file_for_a_debugger_has_them_all() -> None:
    elf = ELFFile(io.BytesIO(symbol_file(SymbolTable(SYMBOLS))))
    assert elf["e_machine"] == "EM_RISCV"
    section = elf.get_section_by_name(".symtab")
    assert section is not None
    found = [one for one in section.iter_symbols() if one.name]
    assert [(one.name, one["st_value"]) for one in found] == [
        (each.name, each.address) for each in SYMBOLS
    ]
    assert [one["st_size"] for one in found[:-1]] == [16] * (len(found) - 1)
    kinds = {one["st_info"]["type"] for one in found}
    assert kinds == {"STT_FUNC", "STT_OBJECT"}
    text = elf.get_section_by_name(".text")
    assert text is not None
    assert text["sh_addr"] == BASE
