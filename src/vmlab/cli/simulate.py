"""`vmlab simulate`: a simulated hypervisor in a process of its own, until it is stopped."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Annotated, Literal

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode


def simulate(
    *,
    socket: Annotated[
        Path | None,
        typer.Option(help="Unix socket to serve on; a new one, which is printed, if left out."),
    ] = None,
    profile: Annotated[
        str, typer.Option(help="standard, performance, unreliable, or a TOML file.")
    ] = "standard",
    seed: Annotated[
        int | None, typer.Option(min=0, help="Source of all randomness; drawn if left out.")
    ] = None,
    clock: Annotated[
        Literal["wall", "virtual"],
        typer.Option(help="Whether latencies take their time, or pass at once."),
    ] = "wall",
    store: Annotated[
        Path | None,
        typer.Option(help="Directory in which the machines of stores outlive this process."),
    ] = None,
    as_json: output.JsonFlag = False,
) -> ExitCode:
    """Run a simulated hypervisor in a process of its own.

    Clients open the hypervisor `simulated` with the option `socket`. A run's machines die with its
    connection, a store's live on. SIGTERM and Ctrl-C end it and clear its socket away.
    """
    from vmlab.hypervisors.simulated.profile import SimulationProfile
    from vmlab.hypervisors.simulated.server import SimulationServer

    server = SimulationServer(SimulationProfile.load(profile), seed=seed, clock=clock, store=store)
    own = None
    if socket is None:
        own = Path(tempfile.mkdtemp(prefix="vmlab-sim-", dir=os.environ.get("XDG_RUNTIME_DIR")))
        socket = own / "socket"
    path = socket

    def ready() -> None:
        facts = {
            "socket": str(path),
            "profile": server.profile.name,
            "seed": server.seed,
            "clock": clock,
            "store": str(store) if store is not None else None,
        }
        if as_json:
            output.print_json(facts)
        else:
            print(
                "\n".join(f"{name}: {value}" for name, value in facts.items() if value is not None)
            )
        # Whoever started this waits for the lines.
        print(end="", flush=True)

    async def until_stopped() -> ExitCode:
        loop = asyncio.get_running_loop()
        serving = asyncio.ensure_future(server.serve(path, ready))
        status = ExitCode.OK

        def stop(how: ExitCode) -> None:
            nonlocal status
            status = how
            serving.cancel()

        loop.add_signal_handler(signal.SIGTERM, stop, ExitCode.OK)
        loop.add_signal_handler(signal.SIGINT, stop, ExitCode.INTERRUPTED)
        await asyncio.wait((serving,))
        if not serving.cancelled():
            # It ended by itself: it could not begin.
            serving.result()
        return status

    try:
        with asyncio.Runner(loop_factory=server.loop_factory()) as runner:
            return runner.run(until_stopped())
    finally:
        if own is not None:
            shutil.rmtree(own)
