"""Reports of the kernel's are found on a console, wherever it is cut; what users print is none."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmlab.lab.console_rules import TEXTS, Rules, text_of
from vmlab.lab.console_scanner import LONGEST_LINE, MOST_LINES, ConsoleScanner, Finding
from vmlab.lab.incident import IncidentKind as K
from vmlab.machine.errors import InvalidSpec


def stamped(*messages: str, at: float = 12.0) -> str:
    return "".join(
        f"[{at + number / 1000:12.6f}] {message}\r\n" for number, message in enumerate(messages)
    )


def scan(text: str | bytes, rules: Rules | None = None, **options: bool) -> list[Finding]:
    scanner = ConsoleScanner(rules or Rules(), **options)
    data = text.encode() if isinstance(text, str) else text
    return scanner.feed(data) + scanner.flush()


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("Kernel panic - not syncing: sysrq triggered crash", K.PANIC),
        ("BUG: kernel NULL pointer dereference, address: 0000000000000000", K.OOPS),
        ("BUG: unable to handle page fault for address: ffffb3e5c0a00000", K.OOPS),
        ("Oops: 0002 [#1] PREEMPT SMP PTI", K.OOPS),
        ("Oops: Oops: 0002 [#1] SMP NOPTI", K.OOPS),
        (
            "general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
            K.OOPS,
        ),
        ("divide error: 0000 [#1] PREEMPT SMP NOPTI", K.OOPS),
        ("Unable to handle kernel NULL pointer dereference at virtual address 0000", K.OOPS),
        ("Unable to handle kernel paging request at virtual address dfff800000000000", K.OOPS),
        ("Oops [#1]", K.OOPS),
        ("Oops - illegal instruction [#1]", K.OOPS),
        ("Internal error: Oops: 0000000096000004 [#1] SMP", K.OOPS),
        ("BUG: Kernel NULL pointer dereference on write at 0x00000000", K.OOPS),
        ("Oops: Kernel access of bad area, sig: 11 [#1]", K.OOPS),
        ("kernel BUG at fs/ext4/inode.c:2763!", K.BUG),
        ("Kernel BUG [#1]", K.OOPS),
        ("BUG: scheduling while atomic: insmod/77/0x00000002", K.BUG),
        ("BUG: sleeping function called from invalid context at mm/slab.h:300", K.BUG),
        ("BUG: workqueue lockup - pool cpus=0 node=0 flags=0x0 nice=0 stuck for 34s!", K.BUG),
        ("BUG: Bad page state in process sh  pfn:1234", K.BUG),
        ("WARNING: CPU: 0 PID: 1 at kernel/workqueue.c:1440 __queue_work+0x2e8/0x3c0", K.WARN),
        ("WARNING: kernel/exit.c:897 at do_exit+0x9b/0xa40, CPU#1: sh/77", K.WARN),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [insmod:77]", K.SOFT_LOCKUP),
        ("BUG: soft lockup - CPU#0 stuck for 61s! [kbd:3360]", K.SOFT_LOCKUP),
        ("watchdog: Watchdog detected hard LOCKUP on cpu 3", K.HARD_LOCKUP),
        ("watchdog: CPU3: Watchdog detected hard LOCKUP on cpu 3", K.HARD_LOCKUP),
        ("watchdog: CPU 2 detected hard LOCKUP on other CPUs 0", K.HARD_LOCKUP),
        ("rcu: INFO: rcu_preempt detected stalls on CPUs/tasks:", K.RCU_STALL),
        ("rcu: INFO: rcu_sched self-detected stall on CPU", K.RCU_STALL),
        ("rcu: INFO: rcu_preempt detected expedited stalls on CPUs/tasks: { 0-... }", K.RCU_STALL),
        ("INFO: task kworker/0:1:9 blocked for more than 120 seconds.", K.HUNG_TASK),
        ("sh invoked oom-killer: gfp_mask=0x140cca(GFP_HIGHUSER), order=0", K.OOM_KILL),
        ("Out of memory: Killed process 77 (tail) total-vm:100kB", K.OOM_KILL),
        ("Memory cgroup out of memory: Killed process 77 (tail) total-vm:1kB", K.OOM_KILL),
        ("BUG: KASAN: slab-out-of-bounds in kmalloc_oob_right+0x1/0x2", K.SANITIZER),
        ("BUG: KFENCE: use-after-free read in test+0x1/0x2", K.SANITIZER),
        ("UBSAN: array-index-out-of-bounds in drivers/x.c:12:3", K.SANITIZER),
        ("WARNING: possible circular locking dependency detected", K.LOCKDEP),
        ("WARNING: inconsistent lock state", K.LOCKDEP),
        ("WARNING: suspicious RCU usage", K.LOCKDEP),
    ],
)
def test_what_the_kernel_says_is_known_as_what_it_is(message: str, kind: K) -> None:
    (found,) = scan(stamped("Linux version 6.12", message, " some_function+0x1/0x2"))
    assert (found.kind, found.message) == (kind, message)
    assert found.excerpt.endswith("some_function+0x1/0x2") or kind is K.OOM_KILL


@pytest.mark.parametrize(
    "message",
    [
        "traps: a.out[77] general protection fault ip:55 sp:7f error:0 in a.out",
        "a.out[77]: segfault at 0 ip 0055 sp 007f error 4 in a.out",
        "Warning: unable to open an initial console.",
        "systemd[1]: BUG: this is not the kernel's",
        "WARNING: something that no kernel test looks for",
        "debug: BUG is a word",
        "hung_task: disabled",
        "EXT4-fs (vda): mounted filesystem",
        "INFO: lockdep is turned off.",
    ],
)
def test_what_is_no_report_is_none(message: str) -> None:
    assert text_of(message) is None
    assert scan(stamped(message)) == []


def test_every_text_is_told_with_where_linux_has_it() -> None:
    assert all(re.search(r"[a-z_/]+\.[ch]: ?|\.c and", text.source) for text in TEXTS)


OOPS = stamped(
    "BUG: kernel NULL pointer dereference, address: 0000000000000000",
    "#PF: supervisor write access in kernel mode",
    "PGD 0 P4D 0",
    "Oops: 0002 [#1] PREEMPT SMP PTI",
    "CPU: 0 PID: 77 Comm: insmod",
    "Call Trace:",
    " do_one_initcall+0x5a/0x300",
    "---[ end trace 0000000000000000 ]---",
)
PANIC = stamped(
    "Kernel panic - not syncing: Fatal exception",
    "Kernel Offset: 0x1000",
    "---[ end Kernel panic - not syncing: Fatal exception ]---",
    at=13.0,
)
WARN = stamped(
    "------------[ cut here ]------------",
    "what the warning says of itself",
    "WARNING: CPU: 0 PID: 1 at kernel/workqueue.c:1440 __queue_work+0x2e8/0x3c0",
    "---[ end trace 0000000000000000 ]---",
    at=14.0,
)
KASAN = stamped(
    "==================================================================",
    "BUG: KASAN: slab-out-of-bounds in f+0x1/0x2",
    "Write of size 1 at addr ffff",
    "==================================================================",
    "Disabling lock debugging due to kernel taint",
    at=15.0,
)
OOM = stamped(
    "tail invoked oom-killer: gfp_mask=0x140cca, order=0, oom_score_adj=0",
    "Mem-Info:",
    "Out of memory: Killed process 77 (tail) total-vm:100kB",
    "oom_reaper: reaped process 77 (tail)",
    at=16.0,
)


def test_reports_have_their_first_and_their_last_line_and_nothing_else() -> None:
    before, after = stamped("before", at=11), stamped("after", at=17)
    found = scan(before + OOPS + PANIC + WARN + KASAN + OOM + after)
    assert [each.kind for each in found] == [K.OOPS, K.PANIC, K.WARN, K.SANITIZER, K.OOM_KILL]
    texts = [OOPS, PANIC, WARN]
    assert [each.excerpt.splitlines() for each in found[:3]] == [t.splitlines() for t in texts]
    assert found[3].excerpt.splitlines() == KASAN.splitlines()[:4]
    assert found[4].message == "Out of memory: Killed process 77 (tail) total-vm:100kB"
    assert "reaped" not in found[4].excerpt and "Mem-Info" in found[4].excerpt


PIECES = st.sampled_from(
    [
        OOPS.encode(),
        PANIC.encode(),
        WARN.encode(),
        OOM.encode(),
        KASAN.encode(),
        b"\x1b[1mlogin: ",
        b"\x1b]0;title\x07\r",
        b"BUG: echoed\n",
        b"\n",
        b"\xff\xfe\x00\xc3",
        b"x" * (LONGEST_LINE + 7),
        b"[   16.5000",
    ]
)


@given(st.lists(PIECES | st.binary(max_size=40), max_size=12), st.data())
def test_any_cut_of_the_stream_gives_the_same(pieces: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(pieces)
    places = data.draw(st.lists(st.integers(0, len(stream)), max_size=30))
    cuts = [0, *sorted(places), len(stream)]
    scanner = ConsoleScanner()
    found: list[Finding] = []
    for start, end in pairwise(cuts):
        found += scanner.feed(stream[start:end])
    assert found + scanner.flush() == scan(stream)


def test_every_byte_alone_gives_the_same() -> None:
    stream = (OOPS + PANIC + KASAN).encode()
    scanner = ConsoleScanner()
    found = [each for byte in stream for each in scanner.feed(bytes([byte]))]
    assert found + scanner.flush() == scan(stream)


@given(st.binary())
def test_whatever_a_guest_prints_is_taken(data: bytes) -> None:
    scan(data)


# What a user prints.


@pytest.mark.parametrize(
    "printed",
    [
        "BUG: kernel NULL pointer dereference, address: 0000\n",
        '# echo "Kernel panic - not syncing: x"\nKernel panic - not syncing: x\n',
        "Nov 21 12:00:00 host kernel: BUG: kernel NULL pointer dereference\n",
        "kernel: [   12.000000] Bug: no\n",
    ],
)
def test_what_a_user_prints_is_no_report_where_the_kernel_prints_times(printed: str) -> None:
    assert scan(stamped("Linux version 6.12.0") + printed + stamped("on", at=13)) == []


def test_a_log_that_is_printed_again_raises_nothing_again() -> None:
    log = stamped("Linux version 6.12.0", at=0) + OOPS + WARN + KASAN + OOM
    assert len(scan(log)) == 4
    assert len(scan(log + "$ dmesg\n" + log + stamped("on", at=20))) == 4


def test_a_report_after_a_printed_log_is_found() -> None:
    log = stamped("Linux version 6.12.0", at=0) + OOPS
    foreign = stamped("hello from another machine", at=9999)
    assert [each.kind for each in scan(log + log + foreign + PANIC)] == [K.OOPS, K.PANIC]


def test_the_same_report_of_another_boot_is_another_one() -> None:
    scanner = ConsoleScanner()
    assert len(scanner.feed(OOPS.encode())) == 1
    assert scanner.feed(OOPS.encode()) == []
    scanner.restarted()
    assert len(scanner.feed(OOPS.encode())) == 1


def test_a_report_that_begins_in_the_middle_of_a_line_is_found() -> None:
    (found,) = scan("\x1b[32mlogin:\x1b[0m " + OOPS)
    assert found.excerpt.startswith("login: [   12.000000] BUG")


def test_lines_of_users_between_those_of_a_report_are_left_out() -> None:
    lines = OOPS.splitlines(keepends=True)
    mixed = "".join(line + f"user output {number}\n" for number, line in enumerate(lines))
    (found,) = scan(mixed)
    assert found.excerpt.splitlines() == OOPS.splitlines()


@pytest.mark.parametrize(
    "prefix", ["<0>[   12.000000] ", "[   12.000000][    T1] ", "[   12.000000][   C3] "]
)
def test_levels_and_callers_are_part_of_the_prefix(prefix: str) -> None:
    (found,) = scan(f"{prefix}kernel BUG at a.c:1!\n")
    assert found.message == "kernel BUG at a.c:1!"


def test_a_kernel_without_times_is_believed_at_the_beginning_of_lines() -> None:
    text = "Linux version 6\n<3>Kernel panic - not syncing: x\n say: BUG: no\n"
    (found,) = scan(text)
    assert found.kind is K.PANIC
    (found,) = scan(stamped("Linux version 6") + "BUG: x\n", stamped=False)
    assert found.kind is K.BUG


def test_where_times_are_known_to_be_printed_a_line_without_is_no_report() -> None:
    assert scan("BUG: x\n", stamped=True) == []
    assert scan("BUG: x\n", Rules(printk_time=True)) == []


# Rules.


def test_reports_are_ignored_by_message_and_by_what_is_in_them() -> None:
    assert scan(OOPS, Rules(ignore=("do_one_init",))) == []
    assert scan(WARN, Rules(ignore=("^WARNING: CPU: .* __queue_work",))) == []
    assert len(scan(OOPS + WARN, Rules(ignore=("__queue_work",)))) == 1


def test_own_patterns_are_found_in_lines_of_anybody_s_or_of_the_kernel_s() -> None:
    rules = Rules.parse(
        """
        tolerate = ["warn", "lockdep"]
        [[patterns]]
        name = "lost"
        regex = "data (loss|lost)"
        lines = 2
        [[patterns]]
        name = "ext4"
        regex = "EXT4-fs error"
        kernel = true
        """
    )
    assert not rules.fails(K.WARN) and rules.fails(K.OOPS)
    text = stamped("x") + "app: data lost!\nmore\nyet more\nEXT4-fs error\n"
    found = scan(text + stamped("EXT4-fs error (vda)", at=13), rules)
    assert [(each.kind, each.rule) for each in found] == [(K.PATTERN, "lost"), (K.PATTERN, "ext4")]
    assert found[0].excerpt == "app: data lost!\nmore"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('tolerate = ["wran"]', "one of panic"),
        ('ignore = ["("]', "regular expression"),
        ("silence = -1", "silence"),
        ('[[patterns]]\nname = "a"\nregex = ""', "regular expression"),
        ('[[patterns]]\nname="a"\nregex="x"\n[[patterns]]\nname="a"\nregex="y"', "name of its own"),
        ("unknown = 1", "unknown"),
    ],
)
def test_wrong_rules_are_told_by_field(text: str, said: str) -> None:
    with pytest.raises(InvalidSpec, match=said):
        Rules.parse(text)


def test_a_long_report_keeps_its_head_and_its_tail() -> None:
    long = stamped(*(f"line {number}" for number in range(3000)), at=20)
    (found,) = scan(
        stamped("kernel BUG at a.c:1!") + long + stamped("---[ end trace 0 ]---", at=30)
    )
    lines = found.excerpt.splitlines()
    assert len(lines) == MOST_LINES + 1
    assert "kernel BUG" in lines[0] and "end trace" in lines[-1]
    assert any("left out" in line for line in lines)


def test_a_report_without_an_end_ends_with_the_next_one_or_when_it_is_long() -> None:
    stuck = stamped("watchdog: BUG: soft lockup - CPU#0 stuck for 22s! [a:1]", "RIP: 0010:f+1")
    found = scan(stuck + OOPS)
    assert [each.kind for each in found] == [K.SOFT_LOCKUP, K.OOPS]
    scanner = ConsoleScanner()
    told = scanner.feed((stuck + stamped(*["x"] * 200, at=13)).encode())
    assert [each.kind for each in told] == [K.SOFT_LOCKUP]
    assert not scanner.busy
