"""LLVM: from IR text to a position-independent relocatable object. The only file of llvmlite.

It runs in the worker process alone (vmlab.engine.compile.worker); the engine never imports it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable

import llvmlite.binding as llvm

llvm.initialize_native_target()
llvm.initialize_native_asmprinter()


def host_fuses(without: Iterable[str] = ()) -> bool:
    """Whether the processor has a fused multiply-add; else LLVM would call a library's."""
    if platform.machine() == "x86_64":
        return "fma" not in without and bool(llvm.get_host_cpu_features().get("fma"))
    return platform.machine() == "aarch64"


def _features(without: Iterable[str]) -> str:
    """What this host's processor has; what is taken away comes last, with all that builds on it."""
    lacking = [f"-{name}" for name in without]
    return ",".join([llvm.get_host_cpu_features().flatten(), *lacking])


def compile_text(text: str, *, optimize: int = 2, without: Iterable[str] = ()) -> bytes:
    """Compile a module for this host's processor.

    Args:
        text: LLVM IR.
        optimize: 0 to 3, of the passes and of the code generator.
        without: Features that are not to be used although the processor has them; "fma" among them
            where one is that it builds on.

    Raises:
        ValueError: the text is no valid module.
    """
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=_features(without),
        opt=optimize,
        reloc="pic",
        codemodel="small",
    )
    try:
        module = llvm.parse_assembly(text, llvm.create_context())
        module.triple = machine.triple
        module.data_layout = str(machine.target_data)
        module.verify()
    except RuntimeError as error:
        raise ValueError(f"LLVM refuses the module: {error}") from error
    options = llvm.create_pipeline_tuning_options(speed_level=optimize)
    # Straight code of a few instructions gains nothing from them, and they cost the most time.
    options.loop_vectorization = False
    options.slp_vectorization = False
    options.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    result: bytes = machine.emit_object(module)
    return result
