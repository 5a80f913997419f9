"""Which lines of a kernel's console tell of its death or of a fault, and which of them matter.

The texts are Linux's own; each stands beside the file and the function that prints it. They are
looked for at the beginning of a message, which is where the kernel has them. How messages are
found in a stream of bytes is `console_scanner`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from vmlab.lab.incident import IncidentKind
from vmlab.machine.documents import parse_document, read_document
from vmlab.machine.fields import Flag, Name, Number, Whole

__all__ = ["DEFAULT", "OwnRule", "Rules", "Text", "text_of"]

K = IncidentKind

_TRACE_END: Final = re.compile(r"---\[ end (trace|Kernel panic)")
"""print_oops_end_marker() and panic() of kernel/panic.c."""
_PANIC_END: Final = re.compile(r"---\[ end Kernel panic|Rebooting in \d+ seconds")
"""panic() of kernel/panic.c; the latter where it restarts (panic_timeout)."""
_RULER: Final = re.compile(r"={16,}$")
"""What reports of mm/kasan/report.c, mm/kfence/report.c and kernel/kcsan/report.c end with."""
_KILLED: Final = re.compile(r"(Out of memory|Memory cgroup out of memory).*: Kill")
_UBSAN_END: Final = re.compile(r"---\[ end trace|={16,}$")


@dataclass(frozen=True, slots=True)
class Text:
    """What a report of the kernel's begins with.

    Attributes:
        kind: What it means.
        begins: Matches the beginning of the message.
        end: Found in the last line of the report; None where nothing marks it.
        source: Where Linux prints it: file and function.
        continues: Kinds of a report under way that such a line belongs to.
    """

    kind: IncidentKind
    begins: re.Pattern[str]
    end: re.Pattern[str] | None
    source: str
    continues: frozenset[IncidentKind] = frozenset()


def _text(
    kind: IncidentKind,
    begins: str,
    end: re.Pattern[str] | None,
    source: str,
    *continues: IncidentKind,
) -> Text:
    return Text(kind, re.compile(begins), end, source, frozenset(continues))


_DIED: Final = (K.OOPS, K.BUG, K.SANITIZER)

TEXTS: Final = (
    _text(K.PANIC, r"Kernel panic - not syncing", _PANIC_END, "kernel/panic.c: panic"),
    # Lockups before "BUG: ": theirs is one of those.
    _text(
        K.SOFT_LOCKUP,
        r"(watchdog: )?BUG: soft lockup - CPU#\d+ stuck for",
        None,
        "kernel/watchdog.c: watchdog_timer_fn",
    ),
    _text(
        K.HARD_LOCKUP,
        r"((NMI )?watchdog: )?(CPU\d+: )?Watchdog detected hard LOCKUP on cpu",
        None,
        "kernel/watchdog.c: watchdog_hardlockup_check",
    ),
    _text(
        K.HARD_LOCKUP,
        r"(watchdog: )?CPU \d+ (self-detected hard LOCKUP|detected hard LOCKUP on other CPUs)",
        None,
        "arch/powerpc/kernel/watchdog.c: soft_nmi_interrupt, watchdog_smp_panic",
    ),
    _text(
        K.RCU_STALL,
        r"(rcu: )?INFO: \S+ (self-)?detected (expedited )?stalls? on (CPUs?|tasks)",
        None,
        "kernel/rcu/tree_stall.h: print_cpu_stall, print_other_cpu_stall; "
        "kernel/rcu/tree_exp.h: synchronize_rcu_expedited_stall; kernel/rcu/tasks.h",
        K.RCU_STALL,
    ),
    _text(
        K.RCU_STALL,
        r"rcu: \S+ kthread (timer wakeup didn't happen|starved) for",
        None,
        "kernel/rcu/tree_stall.h: rcu_check_gp_kthread_starvation",
        K.RCU_STALL,
    ),
    _text(
        K.HUNG_TASK,
        r"INFO: task .+:\d+ (<.*> )?blocked (in I/O wait )?for more than \d+ seconds",
        None,
        "kernel/hung_task.c: check_hung_task",
    ),
    _text(
        K.OOM_KILL,
        r".+ invoked oom-killer: ",
        _KILLED,
        "mm/oom_kill.c: dump_header",
    ),
    _text(
        K.OOM_KILL,
        r"(Out of memory|Memory cgroup out of memory|Out of memory \(\w+\)).*: "
        r"Kill(ed)? process \d+",
        _KILLED,
        "mm/oom_kill.c: __oom_kill_process",
        K.OOM_KILL,
    ),
    _text(
        K.SANITIZER,
        r"BUG: (KASAN|KFENCE|KCSAN|KMSAN): ",
        _RULER,
        "mm/kasan/report.c: print_error_description; mm/kfence/report.c: kfence_report_error; "
        "kernel/kcsan/report.c: print_report; mm/kmsan/report.c: kmsan_report",
    ),
    _text(K.SANITIZER, r"UBSAN: ", _UBSAN_END, "lib/ubsan.c: ubsan_prologue"),
    _text(
        K.OOPS,
        r"BUG: (kernel|Kernel) NULL pointer dereference",
        _TRACE_END,
        "arch/x86/mm/fault.c: show_fault_oops; arch/powerpc/mm/fault.c: bad_page_fault",
        *_DIED,
    ),
    _text(
        K.OOPS,
        r"BUG: [Uu]nable to handle (kernel|page fault)",
        _TRACE_END,
        "arch/x86/mm/fault.c: show_fault_oops; arch/powerpc/mm/fault.c: bad_page_fault",
        *_DIED,
    ),
    _text(
        K.OOPS,
        r"(8<--- cut here ---)?Unable to handle kernel .+ at virtual address",
        _TRACE_END,
        "arch/riscv/mm/fault.c, arch/arm64/mm/fault.c, arch/arm/mm/fault.c: die_kernel_fault",
        *_DIED,
    ),
    _text(
        K.OOPS,
        r"Internal error: .+ \[#\d+\]",
        _TRACE_END,
        "arch/arm64/kernel/traps.c: __die",
        *_DIED,
    ),
    _text(
        K.OOPS,
        r"Oops: .+, sig: \d+ \[#\d+\]",
        _TRACE_END,
        "arch/powerpc/kernel/traps.c: __die",
        *_DIED,
    ),
    _text(
        K.BUG,
        r"[Kk]ernel BUG at ",
        _TRACE_END,
        "lib/bug.c: __report_bug",
        K.BUG,
        K.OOPS,
    ),
    # "Oops: 0002 [#1] PREEMPT SMP", "general protection fault, probably ...: 0000 [#1]",
    # "invalid opcode: 0000 [#1]" and the like of x86; "Oops [#1]", "Kernel BUG [#1]" of riscv.
    _text(
        K.OOPS,
        r"([A-Za-z][^\[\]]*: [0-9a-f]{4}|(Oops|Kernel BUG)( - [^\[\]]+)?) \[#\d+\]",
        _TRACE_END,
        "arch/x86/kernel/dumpstack.c: __die_header; arch/riscv/kernel/traps.c: die",
        *_DIED,
    ),
    _text(K.BUG, r"(workqueue: )?BUG: ", _TRACE_END, "BUG: of kernel/sched/core.c and mm/"),
    _text(
        K.WARN,
        r"WARNING: CPU: \d+ PID: \d+ at ",
        _TRACE_END,
        "kernel/panic.c: __warn",
    ),
    _text(
        K.WARN,
        r"WARNING: .+, CPU#\d+: ",
        _TRACE_END,
        "kernel/panic.c: __warn, from Linux 6.19 on",
    ),
    _text(
        K.LOCKDEP,
        r"WARNING: (possible .*(lock|dependency)|inconsistent lock state|bad unlock balance|"
        r"Nested lock was not taken|held lock freed|suspicious RCU usage|"
        r".+ still has locks held|lock held when returning to user space)",
        None,
        "kernel/locking/lockdep.c: print_circular_bug_header and its neighbours",
    ),
)
"""What reports begin with; the first that matches counts."""


# One look tells of most lines that they are none of these.
_WORTH_A_LOOK: Final = re.compile(
    r"panic|BUG|WARNING|LOCKUP|INFO: |kthread|oom-killer|emory|UBSAN|Unable|Internal error|Oops|\[#"
)


def text_of(message: str) -> Text | None:
    """What a message of the kernel's is the beginning of, if of anything."""
    if _WORTH_A_LOOK.search(message) is None:
        return None
    return next((text for text in TEXTS if text.begins.match(message)), None)


def _expression(value: object) -> object:
    if not isinstance(value, str) or not value:
        raise ValueError("a regular expression of Python's `re`, not empty")
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"a regular expression of Python's `re` ({error})") from error
    return value


Expression = Annotated[str, BeforeValidator(_expression)]


def _kind(value: object) -> object:
    """The kind of that name; a list of them is frozen."""
    if isinstance(value, str) and value in set(IncidentKind):
        return IncidentKind(value)
    raise ValueError(f"one of {', '.join(kind.value for kind in IncidentKind)}")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class OwnRule(_Model):
    """A line of the user's own that is to be found."""

    name: Name = Field(description="what the report calls it")
    regex: Expression = Field(description="searched for in each line")
    kernel: Flag = Field(False, description="only in lines that the kernel printed")
    lines: Whole = Field(1, ge=1, le=400, description="how many lines its excerpt has")


class Rules(_Model):
    """What of a machine's incidents fails a test."""

    tolerate: tuple[Annotated[IncidentKind, BeforeValidator(_kind)], ...] = Field(
        (), description="kinds of incident that are noted, and fail nothing"
    )
    ignore: tuple[Expression, ...] = Field(
        (), description="reports in which one of these is found are no incidents"
    )
    patterns: tuple[OwnRule, ...] = Field((), description="lines of one's own that are incidents")
    silence: Number = Field(
        60.0,
        ge=0,
        description="seconds without a sign of life in which the guest could have given one; "
        "0 is not to ask for any",
    )
    printk_time: Annotated[bool, Flag] | None = Field(
        None, description="whether the kernel's lines begin with a time; found out if left out"
    )

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        names = [rule.name for rule in self.patterns]
        if len(set(names)) != len(names):
            raise ValueError("every pattern needs a name of its own")
        return self

    @classmethod
    def load(cls, source: Path) -> Rules:
        """Read rules from a TOML or JSON file.

        Raises:
            InvalidSpec: naming file, field, value and what would be right.
        """
        return read_document(cls, source)

    @classmethod
    def parse(cls, text: str | bytes, *, form: str = "toml", source: str | None = None) -> Rules:
        """Read rules from text in `form` "toml" or "json".

        Raises:
            InvalidSpec: naming field, value and what would be right.
        """
        return parse_document(cls, text, form=form, source=source)

    def fails(self, kind: IncidentKind) -> bool:
        """Whether an incident of that kind fails a test."""
        return kind not in self.tolerate

    def ignores(self, message: str, excerpt: str) -> bool:
        """Whether a report is one of those that are no incidents."""
        return any(
            re.search(expression, message) or re.search(expression, excerpt)
            for expression in self.ignore
        )

    def tolerating(self, *kinds: IncidentKind) -> Rules:
        """The same rules, by which these kinds fail nothing as well."""
        return self.model_copy(update={"tolerate": (*self.tolerate, *kinds)})

    def own(self, line: str, *, kernel: bool) -> Iterator[OwnRule]:
        """The user's rules that a line fulfils."""
        for rule in self.patterns:
            if (kernel or not rule.kernel) and re.search(rule.regex, line):
                yield rule


DEFAULT: Final = Rules()
"""Every kind fails the test."""
