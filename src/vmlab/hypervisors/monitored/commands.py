"""Commands of the host that are over soon: run, listened to, never left behind.

Processes that last are `vmlab.hypervisors.processes`' affair.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress


async def run_command(*words: str) -> tuple[int, str, str]:
    """Run a command to its end; a cancelled call leaves no process.

    Returns:
        Its status, what it printed, and what it complained of.

    Raises:
        FileNotFoundError: it is not installed.
    """
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, complaint = await process.communicate()
    except BaseException:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    assert process.returncode is not None, "it has ended"
    return process.returncode, output.decode(), complaint.decode(errors="replace").strip()
