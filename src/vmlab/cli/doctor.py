"""``vmlab doctor``: explains this host."""

from __future__ import annotations

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode

__all__ = ["doctor"]

_COLUMNS = (
    output.Column("status", "", no_wrap=True),
    output.Column("name", "what", no_wrap=True),
    output.Column("detail", "found"),
    output.Column("hint", "what to do"),
)


def doctor(as_json: output.JsonFlag = False) -> ExitCode:
    """Explain this host: accelerators, QEMU, memory, disk, permissions, what to install.

    Each finding is `ok`; `warn`, where machines run but not as they could; or `missing`. The exit
    status says whether any hypervisor works here at all.
    """
    from vmlab.hypervisors.doctor import Status, diagnose

    diagnosis = diagnose()
    if as_json:
        output.print_json(diagnosis)
    else:
        rows = [
            finding.model_dump() | {"hint": finding.hint or ""} for finding in diagnosis.findings
        ]
        output.print_table(_COLUMNS, rows, as_json=False, title=diagnosis.system)
        print()
        counts = {status: len(diagnosis.having(status)) for status in Status}
        print(", ".join(f"{count} {status.value}" for status, count in counts.items()))
        if diagnosis.install:
            print(f"install what is missing: {diagnosis.install}")
        if not diagnosis.usable:
            print("no hypervisor works here")
    return ExitCode.OK if diagnosis.usable else ExitCode.UNAVAILABLE
