"""The manager's service with 10,000 machines in the store: how soon it answers, and its memory.

A manager with a simulated host serves on a unix socket in a process of its own, kept to one core.
Its store has been given 10,000 machines. Then clients ask for 100 things a second, at moments that
do not wait for the answers (an open loop: who waits for an answer before asking again hides how
slow it was): single machines, pages of a list filtered by state or label, operations, events, and
changes that are answered with 202 and carried out meanwhile. Told are the percentiles of reads and
of changes, CPU, and memory (PSS). Beside them, as many requests a second for nothing (404 of a path
that there is not), which is what HTTP alone takes here.

    python benchmarks/manager.py [--machines 10000] [--seconds 30] [--rate 100]

The table is printed and written to `results/manager.json`, unless `--results` names a file. It ends
with status 1 where a promise is broken: p99 of reads under 20 ms, of changes to 202 under 50 ms,
under 400 MB.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

READ_P99 = 0.020
CHANGE_P99 = 0.050
MEMORY = 400 * 10**6

_LATENCIES = (
    *("create", "start", "stop", "kill", "pause", "resume", "delete", "status", "network"),
    *("disk", "snapshot", "restore", "fork", "resize", "fault", "migration"),
)


def _fill(home: Path, machines: int) -> None:
    """Put machines into the store of a home, as if they had been made and started or not."""
    from vmlab.hypervisors.ownership import Home
    from vmlab.manager.settings import Settings
    from vmlab.manager.store.database import Database
    from vmlab.manager.store.tables import HostRow, MachineRow, NicRow, TemplateRow

    def fill(session: Any) -> None:
        if session.get(HostRow, "simulated") is None:
            session.add(HostRow(name="simulated", hypervisor="simulated"))
        template = TemplateRow(name="small", memory=512 << 20, vcpus=1, spec={})
        session.add(template)
        session.flush()
        for number in range(machines):
            row = MachineRow(
                name=f"filled-{number:05d}",
                state="stopped" if number % 3 else "created",
                host="simulated",
                hypervisor="simulated",
                template_id=template.id,
                architecture="x86_64",
                vcpus=1,
                memory=512 << 20,
                spec={"name": f"m-{number:012x}", "memory": {"size": "512M"}},
                labels={"role": f"r{number % 100}"},
                policy={},
                metadata_={},
            )
            session.add(row)
            session.flush()
            mac = ":".join(f"{byte:02x}" for byte in (0x52, 0x54, *number.to_bytes(4, "big")))
            session.add(NicRow(machine_id=row.id, name="net0", mode="none", mac=mac))

    database = Database.open(Settings(home=Home.open(home)))
    try:
        database.write_now(fill)
    finally:
        database.close()


async def _serve(home: Path, profile: Path, path: str) -> None:
    """Serve the manager of a home on a unix socket until SIGTERM comes."""
    import uvicorn

    from vmlab.hypervisors.ownership import Home
    from vmlab.manager.api import create_app, end_streams
    from vmlab.manager.api.logs import configure
    from vmlab.manager.manager import Manager
    from vmlab.manager.settings import HostSetting, Settings

    configure(home / "log")
    host = HostSetting(
        name="simulated",
        hypervisor="simulated",
        options={"clock": "wall", "profile": str(profile), "seed": "1"},
    )
    # The machines are in the store alone, so there is nothing for the observer to compare.
    settings = Settings(home=Home.open(home), hosts=(host,), sweep_seconds=86_400)
    ending = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ending.set)
    async with await Manager.open(settings) as manager:
        app = create_app(manager, authenticate=False)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(128)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_keep_alive=120))
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign]  # ours
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await ending.wait()
        end_streams(app)
        server.should_exit = True
        await serving
        listener.close()


# ------------------------------------------------------------------- clients


class Answers:
    """How long answers took, by what was asked."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.wrong: list[str] = []

    def percentile(self, kind: str, part: float) -> float:
        """Seconds that `part` of the answers took at most."""
        taken = sorted(self.seconds[kind])
        return taken[min(len(taken) - 1, int(part * len(taken)))]


def _reading(chances: random.Random, machines: int) -> str:
    number = chances.randrange(machines)
    return chances.choices(
        (
            f"/v1/machines/filled-{number:05d}",
            f"/v1/machines?state=created&limit=20&name=filled-{number // 100:03d}*",
            f"/v1/machines?label=role%3Dr{number % 100}&limit=10",
            "/v1/operations?limit=20",
            "/v1/events?limit=20",
            "/v1/hosts",
        ),
        (60, 10, 5, 10, 10, 5),
    )[0]


async def _ask(
    client: Any, answers: Answers, kind: str, method: str, path: str, due: float, body: Any = None
) -> None:
    """Ask at a moment, and note how long after that the answer was there."""
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    begun = time.perf_counter()
    answer = await client.request(method, path, json=body)
    answers.seconds[kind].append(time.perf_counter() - begun)
    expected = {"read": 200, "change": 202, "nothing": 404}[kind]
    if answer.status_code != expected:
        answers.wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")


async def _measure(
    path: str, machines: int, rate: float, seconds: float, *, nothing: bool = False
) -> Answers:
    """Ask `rate` things a second for so long: nine of ten are reads."""
    import httpx

    chances = random.Random(1)
    answers = Answers()
    transport = httpx.AsyncHTTPTransport(uds=path, limits=httpx.Limits(max_connections=64))
    async with httpx.AsyncClient(
        transport=transport, base_url="http://localhost", timeout=120
    ) as client:
        for _ in range(20):
            await client.get("/v1/machines", params={"limit": 1})
        begin = time.perf_counter() + 0.5
        tasks = []
        for number in range(int(rate * seconds)):
            due = begin + number / rate
            if nothing:
                asked: tuple[Any, ...] = ("nothing", "GET", "/nothing", due)
            elif number % 10:
                asked = ("read", "GET", _reading(chances, machines), due)
            else:
                label = {"labels": {"role": f"r{chances.randrange(100)}"}}
                name = f"filled-{chances.randrange(machines):05d}"
                asked = ("change", "PATCH", f"/v1/machines/{name}", due, label)
            tasks.append(asyncio.create_task(_ask(client, answers, *asked)))
        await asyncio.gather(*tasks)
    return answers


# ------------------------------------------------------------------- the whole of it


def _memory(pid: int) -> int:
    """Bytes of a process, with its part of what it shares (PSS, proc(5))."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    return next(int(line.split()[1]) for line in text.splitlines() if line[:4] == "Pss:") * 1024


def _cpu(pid: int) -> float:
    """CPU seconds of a process (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _until_quiet(pid: int) -> None:
    """Wait until a manager has seen that none of its machines are at their host, and said so."""
    quiet, deadline = 0, time.monotonic() + 90
    while quiet < 2 and time.monotonic() < deadline:
        before = _cpu(pid)
        time.sleep(1)
        quiet = quiet + 1 if _cpu(pid) - before < 0.05 else 0


def _run(arguments: argparse.Namespace, directory: Path) -> dict[str, Any]:
    home = directory / "home"
    home.mkdir(mode=0o700)
    profile = directory / "profile.toml"
    latencies = "\n".join(f"{name} = 0" for name in _LATENCIES)
    profile.write_text(f'extends = "performance"\n[latency]\n{latencies}\n', encoding="utf-8")
    begun = time.perf_counter()
    _fill(home, arguments.machines)
    filled = time.perf_counter() - begun
    path = str(directory / "s")
    core = min(os.sched_getaffinity(0))
    server = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(home), str(profile), path, str(core)]
    )
    try:
        deadline = time.monotonic() + 120
        while not _answers(path):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the manager does not answer")
            time.sleep(0.1)
        _until_quiet(server.pid)
        rest = os.sched_getaffinity(0) - {core}
        if rest:
            os.sched_setaffinity(0, rest)
        nothing = asyncio.run(_measure(path, arguments.machines, arguments.rate, 5, nothing=True))
        before, begun = _cpu(server.pid), time.perf_counter()
        answers = asyncio.run(_measure(path, arguments.machines, arguments.rate, arguments.seconds))
        cpu = (_cpu(server.pid) - before) / (time.perf_counter() - begun)
        memory = _memory(server.pid)
    finally:
        server.terminate()
        server.wait(60)
    if answers.wrong:
        raise SystemExit("answers that were not expected:\n" + "\n".join(answers.wrong[:5]))
    found: dict[str, Any] = {
        "machines": arguments.machines,
        "rate": arguments.rate,
        "seconds": arguments.seconds,
        "load": round(os.getloadavg()[0], 1),
        "fill_seconds": round(filled, 2),
        "cpu_share": round(cpu, 3),
        "memory_bytes": memory,
    }
    answers.seconds["nothing"] = nothing.seconds["nothing"]
    for kind in ("read", "change", "nothing"):
        found[kind] = {
            "count": len(answers.seconds[kind]),
            "mean_ms": round(statistics.mean(answers.seconds[kind]) * 1000, 2),
            **{
                f"p{part}_ms": round(answers.percentile(kind, part / 100) * 1000, 2)
                for part in (50, 90, 99)
            },
        }
    return found


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
    return True


def main() -> int:
    """Measure, print, and say whether the promises are kept."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--machines", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results" / "manager.json"
    )
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        home, profile, path, core = arguments.serve
        os.sched_setaffinity(0, {int(core)})
        asyncio.run(_serve(Path(home), Path(profile), path))
        return 0
    # A unix socket's path is short.
    directory = Path(tempfile.mkdtemp(prefix="vmlab-b-"))
    try:
        found = _run(arguments, directory)
    finally:
        shutil.rmtree(directory)
    print(f"{'':10}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}{'mean ms':>10}{'count':>8}")
    for kind in ("read", "change", "nothing"):
        row = found[kind]
        print(
            f"{kind:10}{row['p50_ms']:>10}{row['p90_ms']:>10}{row['p99_ms']:>10}"
            f"{row['mean_ms']:>10}{row['count']:>8}"
        )
    print(
        f"{found['cpu_share']:.0%} of a core, {found['memory_bytes'] / 1e6:.0f} MB, "
        f"at a load of {found['load']}"
    )
    arguments.results.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    kept = (
        found["read"]["p99_ms"] < READ_P99 * 1000
        and found["change"]["p99_ms"] < CHANGE_P99 * 1000
        and found["memory_bytes"] < MEMORY
    )
    if not kept:
        print(
            f"a promise is broken: p99 under {READ_P99 * 1000:g} ms (read) and "
            f"{CHANGE_P99 * 1000:g} ms (change), under {MEMORY / 1e6:g} MB"
        )
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
