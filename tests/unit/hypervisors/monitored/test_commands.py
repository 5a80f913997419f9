"""Commands of the host: what is told of them, and that none is left behind."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from vmlab.hypervisors.monitored.commands import run_command


def test_status_output_and_complaint_are_told() -> None:
    found = asyncio.run(run_command("sh", "-c", "echo out; echo why >&2; exit 3"))
    assert found == (3, "out\n", "why")
    with pytest.raises(FileNotFoundError):
        asyncio.run(run_command("vmlab-no-such-command"))


def test_a_cancelled_call_leaves_no_process(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    async def test() -> None:
        # It tells its id when it runs, and would wait for ever then.
        script = f"echo $$ >{pipe}; exec sleep infinity"
        running = asyncio.create_task(run_command("sh", "-c", script))
        process = int(await asyncio.to_thread(pipe.read_text))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

    asyncio.run(asyncio.wait_for(test(), 60))
