"""``vmlab serve``: the manager as a service, in the foreground or in the background."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.manager.connecting import extra
from vmlab.cli.output import JsonFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vmlab.manager.service.listening import Listening

__all__ = ["serve"]


def serve(
    *,
    host: Annotated[
        str, typer.Option("--host", help="Address to answer TCP on, with --port.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option("--port", min=0, max=65535, help="TCP port; 0 takes one that is free."),
    ] = None,
    socket: Annotated[
        Path | None,
        typer.Option("--socket", help="Another unix socket, beside that of VMLAB_HOME."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", help="Certificates (PEM), for TLS.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="Private key (PEM) of --tls-cert.")
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Go into the background once it answers.")
    ] = False,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the manager of this home; its machines live on.")
    ] = False,
    as_json: JsonFlag = False,
) -> ExitCode:
    """Be the manager of VMLAB_HOME, for other commands, programs, other hosts and browsers.

    It answers on a unix socket in VMLAB_HOME, which only you can open, and where else it is told
    to. Over TCP it asks for a token (`vmlab token create`). No command needs it: each starts a
    manager that leaves by itself. SIGTERM and Ctrl-C end it; machines live on.
    """
    with extra():
        from vmlab.hypervisors.ownership import Home
        from vmlab.manager.client.address import directory_of
        from vmlab.manager.client.background import LOG
        from vmlab.manager.service.detaching import detached
        from vmlab.manager.service.holding import end_holder
        from vmlab.manager.service.listening import Listening

        home = Home.open()
        if stop:
            ended = end_holder(directory_of(home))
            print("no manager runs" if ended is None else f"process {ended.pid} has ended")
            return ExitCode.OK
        listening = Listening(host, port, socket, tls_cert, tls_key)
        listening.check()
        if detach:
            log = directory_of(home) / LOG
            _tell(as_json, detached(log, partial(_live, listening)))
        else:
            _live(listening, partial(_tell, as_json))
        return ExitCode.OK


def _live(listening: Listening, ready: Callable[[Mapping[str, Any]], None]) -> None:
    """Serve, until it is told to end."""
    import asyncio

    from vmlab.manager.api.logs import configure
    from vmlab.manager.service.serving import serve as serving
    from vmlab.manager.settings import Settings

    configure()
    asyncio.run(serving(Settings.from_environment(), listening, ready=ready))


def _tell(as_json: bool, facts: Mapping[str, Any]) -> None:
    if as_json:
        output.print_json(dict(facts))
    else:
        for url in facts["urls"]:
            print(url)
        if any(url.startswith("http") for url in facts["urls"]):
            output.note("over TCP, in a browser too, it asks for what `vmlab token create` makes")
        output.note("`vmlab serve --stop` ends it; its machines live on")
    # Whoever started this waits for the lines.
    print(end="", flush=True)
