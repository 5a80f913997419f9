"""Zicsr, Zifencei, the privileged instructions, Svinval, Zicbom and Zicboz.

RISC-V unprivileged 20191213, chapters 3 and 9; privileged 1.12, 3.3, 4.2 and 5.3; cache management
1.0. What CSRs hold, how traps return and what a fence flushes is in vmlab.engine.cpu; here is which
of it an instruction asks for.
"""

from __future__ import annotations

from vmlab.engine.isa.cpu import Cpu
from vmlab.engine.isa.encoding import Body, Group
from vmlab.engine.isa.values import Value

csr = Group("Zicsr")
instruction_fence = Group("Zifencei")
privileged = Group("privileged")
invalidation = Group("Svinval")
cache_blocks = Group("Zicbom")
cache_zero = Group("Zicboz")


def _operand(cpu: Cpu, *, immediate: bool) -> Value:
    return cpu.field("rs1") if immediate else cpu.rs1


def _write(*, immediate: bool) -> Body:
    def body(cpu: Cpu) -> None:
        new = _operand(cpu, immediate=immediate)
        old = cpu.system_call("read_csr", cpu.imm, Value(1, 64))
        cpu.system_call("write_csr", cpu.imm, new)
        cpu.rd = old
        cpu.resume_at(cpu.next_pc)

    return body


def _modify(*, immediate: bool, clear: bool) -> Body:
    def body(cpu: Cpu) -> None:
        operand = _operand(cpu, immediate=immediate)
        if cpu.field("rs1").eq(0):
            cpu.rd = cpu.system_call("read_csr", cpu.imm, Value(0, 64))
            return
        old = cpu.system_call("read_csr", cpu.imm, Value(1, 64))
        # mip's SEIP reads as the OR with the interrupt controller's line, but a set or clear acts
        # on the bit that was written (privileged 1.12, 3.1.9).
        stored = cpu.system_call("stored_csr", cpu.imm, old)
        cpu.system_call("write_csr", cpu.imm, stored & ~operand if clear else stored | operand)
        cpu.rd = old
        cpu.resume_at(cpu.next_pc)

    return body


for _suffix, _high, _immediate, _assembly in (
    ("", "0", False, "rd,csr,rs1"),
    ("i", "1", True, "rd,csr,uimm"),
):
    for _name, _low, _body in (
        ("csrrw", "01", _write(immediate=_immediate)),
        ("csrrs", "10", _modify(immediate=_immediate, clear=False)),
        ("csrrc", "11", _modify(immediate=_immediate, clear=True)),
    ):
        csr.add(
            _name + _suffix,
            f"csr rs1 {_high}{_low} rd 1110011",
            _body,
            _assembly,
            system=True,
        )


@instruction_fence.instruction("fence.i", "000000000000 00000 001 00000 0001111", system=True)
def fence_i(cpu: Cpu) -> None:
    """Writes to code take effect at once here; all that is left is to poll."""
    cpu.resume_at(cpu.next_pc)


@privileged.instruction("mret", "001100000010 00000 000 00000 1110011", system=True)
def mret(cpu: Cpu) -> None:
    cpu.resume_at(cpu.system_call("return_from_machine_trap"))


@privileged.instruction("sret", "000100000010 00000 000 00000 1110011", system=True)
def sret(cpu: Cpu) -> None:
    cpu.resume_at(cpu.system_call("return_from_supervisor_trap"))


@privileged.instruction("wfi", "000100000101 00000 000 00000 1110011", system=True)
def wfi(cpu: Cpu) -> None:
    if cpu.system_call("must_wait"):
        cpu.wait()


def _fence_addresses(*, needs_permission: bool) -> Body:
    def body(cpu: Cpu) -> None:
        if needs_permission:
            cpu.system_call("check_fence_allowed")
        cpu.system_call(
            "flush_translations",
            cpu.field("rs1").ne(0).zero_extend(64),
            cpu.rs1,
            cpu.field("rs2").ne(0).zero_extend(64),
            cpu.rs2,
        )
        cpu.resume_at(cpu.next_pc)

    return body


privileged.add(
    "sfence.vma",
    "0001001 rs2 rs1 000 00000 1110011",
    _fence_addresses(needs_permission=True),
    "rs1,rs2",
    system=True,
)
invalidation.add(
    "sinval.vma",
    "0001011 rs2 rs1 000 00000 1110011",
    _fence_addresses(needs_permission=True),
    "rs1,rs2",
    system=True,
)


def _order_invalidations(cpu: Cpu) -> None:
    """`sinval.vma` is done when it retires, so nothing is left to order."""
    cpu.system_call("check_supervisor")


for _name, _number in (("sfence.w.inval", "00000"), ("sfence.inval.ir", "00001")):
    invalidation.add(
        _name,
        f"0001100 {_number} 00000 000 00000 1110011",
        _order_invalidations,
        system=True,
    )


def _manage_block(*, invalidate: bool) -> Body:
    def body(cpu: Cpu) -> None:
        cpu.system_call("check_block_management", Value(int(invalidate), 64))
        cpu.check_block(cpu.rs1)

    return body


for _name, _number in (("inval", "00000"), ("clean", "00001"), ("flush", "00010")):
    cache_blocks.add(
        f"cbo.{_name}",
        f"0000000 {_number} rs1 010 00000 0001111",
        _manage_block(invalidate=_name == "inval"),
        "(rs1)",
        system=True,
    )


@cache_zero.instruction("cbo.zero", "0000000 00100 rs1 010 00000 0001111", "(rs1)", system=True)
def cbo_zero(cpu: Cpu) -> None:
    cpu.system_call("check_block_zero")
    cpu.zero_block(cpu.rs1)
