"""The interpreter: a native function per instruction, each of which jumps to the next one's.

Every handler has the signature

    tailcc void handler(ptr noalias state, ptr record, i64 pc_base, i64 budget, ptr tlb)

and ends with a tail call of the handler in the record that follows. A decode record is 16 bytes per
halfword of code: {ptr handler, i32 imm, u8 rd, u8 rs1, u8 rs2, u8 rs3}, and `pc` is `pc_base` plus
an eighth of the record's address. `budget` counts instructions down. `tlb` is the set of
translations in use. Compiled regions have the same signature and take handlers' places.

Handlers are written in vmlab.engine.compile.handlers, from the bodies in vmlab.engine.isa, and what
runs between them in vmlab.engine.compile.glue. Here is the whole of it, with the host's ways in.
Nothing in these files knows what an instruction does.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

from vmlab.engine.compile.decoder import decoder_text
from vmlab.engine.compile.emitter import FunctionEmitter
from vmlab.engine.compile.glue import write_glue
from vmlab.engine.compile.handlers import HandlerWriter
from vmlab.engine.compile.native import (
    ATTRIBUTES,
    LOOPS,
    ModuleEmitter,
    NativeCore,
    drop_writes,
)
from vmlab.engine.cpu import layout
from vmlab.engine.cpu.exits import Reason
from vmlab.engine.cpu.fences import serve_fences
from vmlab.engine.cpu.interrupts import HOST_ROUTINES
from vmlab.engine.isa.encoding import InstructionSet
from vmlab.engine.isa.values import Value

_HOST_PREFIX = "host."


def _entry_text(name: str, target: str, *, first: str = "") -> str:
    """A C function `void name(state)` that goes to a glue function with what the state says.

    Who asks for fences sees that the hart is inside. It still is while the host completes a store
    to RAM, whose address was translated already.

    Args:
        name: its own.
        target: the glue function's.
        first: a C function of the state that is called before.
    """
    fields = {
        "pc": layout.PC,
        "end": layout.SLICE_END,
        "retired": layout.RETIRED,
        "tlb": layout.TLB,
    }
    loads = "".join(
        f"  %{register}.p = getelementptr i8, ptr %s, i64 {field.offset}\n"
        f"  %{register} = load i64, ptr %{register}.p\n"
        for register, field in fields.items()
    )
    inside = (
        f"  %shared.p = getelementptr i8, ptr %s, i64 {layout.SHARED.offset}\n"
        "  %shared = load ptr, ptr %shared.p\n"
        f"  %inside = getelementptr i8, ptr %shared, i64 {8 * layout.SHARED_INSIDE}\n"
        "  store atomic i64 1, ptr %inside monotonic, align 8\n"
        "  fence seq_cst\n"
        "  call void @fence(ptr %s)\n"
    )
    outside = (
        f"  %reason.p = getelementptr i8, ptr %s, i64 {layout.REASON.offset}\n"
        "  %reason = load i64, ptr %reason.p\n"
        f"  %writes = icmp eq i64 %reason, {Reason.WRITE.value}\n"
        "  %still = zext i1 %writes to i64\n"
        "  store atomic i64 %still, ptr %inside release, align 8\n"
    )
    return (
        f"define hidden void @{name}(ptr %s) {ATTRIBUTES} {{\n"
        + inside
        + (f"  call void @{first}(ptr %s)\n" if first else "")
        + f"{loads}"
        "  %budget = sub i64 %end, %retired\n"
        "  %t = inttoptr i64 %tlb to ptr\n"
        f"  call tailcc void @{target}(ptr %s, ptr null, i64 %pc, i64 %budget, ptr %t)\n"
        + outside
        + "  ret void\n}\n"
    )


def _void_entry(
    module: ModuleEmitter, name: str, body: Callable[[NativeCore], None], parameters: str = ""
) -> None:
    """A C function `void name(state, ...)`."""
    function = FunctionEmitter()
    core = NativeCore(module, function)

    def run() -> None:
        body(core)
        function.effect("ret void")

    function.explore(run)
    module.add(name, function.text(f"define hidden void @{name}(ptr %s{parameters}) {ATTRIBUTES}"))


def _host_entry(module: ModuleEmitter, operation: Callable[..., Value]) -> None:
    """A C function of a routine's name, `u64 name(state, u64 ...)`."""
    function = FunctionEmitter()
    core = NativeCore(module, function)
    count = len(signature(operation).parameters) - 1
    arguments = [Value(f"%a{index}", 64, function) for index in range(count)]

    def run() -> None:
        function.effect(f"ret {operation(core, *arguments).typed}")

    function.explore(run)
    parameters = "".join(f", i64 %a{index}" for index in range(count))
    name = f"{_HOST_PREFIX}{operation.__name__}"
    header = f'define hidden i64 @"{name}"(ptr %s{parameters}) {ATTRIBUTES}'
    module.add(name, function.text(header))


def interpreter_text(instructions: InstructionSet, *, host_fuses: bool) -> str:
    """The whole interpreter of an instruction set as LLVM IR.

    Args:
        instructions: the set.
        host_fuses: the host that it is for has a fused multiply-add.

    Its symbols: `h.NUMBER.NAME` for the handlers that records may name, `c.NUMBER.NAME` for those
    that count hits and take their places; `run(state)` which polls
    and then executes; `go_on(state)` which only executes, `go_on_elsewhere(state)` which comes from
    another page and polls if the budget is used up; `run_changed(state)` and
    `flush_all(state)` for the host that changed registers or memory; `drop_writes(state, page)` for
    a page of the host's that must not be written unseen any more; `host.NAME(state, ...)` for what
    the host does to interrupts; and `decode_page(code, records, handlers)`.
    """
    module = ModuleEmitter(host_fuses=host_fuses)
    writer = HandlerWriter(instructions, module)
    writer.write()
    write_glue(module, writer.names)
    module.add("loops", LOOPS)
    module.add("run", _entry_text("run", "poll_at"))
    module.add("run_changed", _entry_text("run_changed", "poll_at", first="select_set"))
    module.add("go_on", _entry_text("go_on", "find"))
    module.add("go_on_elsewhere", _entry_text("go_on_elsewhere", "lookup"))
    zero = Value(0, 64)
    _void_entry(module, "fence", serve_fences)
    _void_entry(module, "select_set", lambda core: core.select_translations())
    _void_entry(module, "flush_all", lambda core: core.flush_translations(zero, zero, zero, zero))
    _void_entry(
        module,
        "drop_writes",
        lambda core: drop_writes(core, Value("%host", 64, core.function)),
        ", i64 %host",
    )
    for operation in HOST_ROUTINES:
        _host_entry(module, operation)
    module.add("decode", decoder_text(instructions, writer.names))
    return module.text()
