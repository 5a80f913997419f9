"""The manager in the background: begun when needed, one, gone when not, killed at any moment."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import psutil
import pytest
from tests.integration.manager.cli.conftest import PATIENCE, Person

from vmlab.manager.client import AsyncClient, Client, Unreachable


def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"{what}: it never came"
        time.sleep(0.05)


def ended(child: Popen[bytes]) -> tuple[int, str, str]:
    """Wait for a command; its status and what it said."""
    out, err = child.communicate(timeout=PATIENCE)
    return child.returncode, out.decode(), err.decode()


def test_however_many_need_one_at_once_there_is_one(newcomer: Person) -> None:
    assert newcomer.manager is None
    children = [newcomer.begins("list") for _ in range(3)]
    said = [ended(child) for child in children]
    assert [each[0] for each in said] == [0, 0, 0], said
    found = newcomer.manager
    assert found is not None
    assert found.background
    processes = [
        process.pid
        for process in psutil.process_iter(["cmdline"])
        if "vmlab.manager.service" in (process.info["cmdline"] or ())
        and _home_of(process) == str(newcomer.home)
    ]
    assert processes == [found.pid]
    newcomer.does("host", "list")
    assert newcomer.manager == found


def _home_of(process: psutil.Process) -> str | None:
    try:
        return process.environ().get("VMLAB_HOME")
    except psutil.Error:
        return None


def test_it_is_a_process_of_nobody_s_and_its_socket_is_its_user_s(newcomer: Person) -> None:
    newcomer.does("list")
    found = newcomer.manager
    assert found is not None
    assert os.getsid(found.pid) not in {os.getsid(0), 0}
    assert psutil.Process(found.pid).parent() != psutil.Process()
    (url,) = found.urls
    path = Path(url.removeprefix("unix:"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert (newcomer.home / "manager" / "manager.log").stat().st_mode & 0o077 == 0


def test_it_leaves_when_nothing_needs_it_and_comes_back(
    newcomer: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMLAB_LINGER_SECONDS", "0.5")
    newcomer.does("create", "kept", "--spec", str(newcomer.spec), "-H", "simulated")
    first = newcomer.manager
    until(lambda: newcomer.manager is None, "the manager leaves")
    assert newcomer.does("list", "-q") == "kept"
    monkeypatch.setenv("VMLAB_LINGER_SECONDS", "600")
    until(lambda: newcomer.manager is None, "the second manager leaves, too")
    newcomer.does("start", "kept")
    assert newcomer.manager is not None
    assert newcomer.manager != first


def test_a_machine_that_is_looked_after_keeps_it(
    newcomer: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMLAB_LINGER_SECONDS", "0.5")
    newcomer.does(
        "create", "watched", "--spec", str(newcomer.spec), "-H", "simulated",
        "--snapshot-every", "1d", "--start",
    )  # fmt: skip
    found = newcomer.manager
    assert found is not None
    # Several times what it would wait for otherwise; too short a time fails no right manager.
    time.sleep(4)
    assert newcomer.manager == found
    newcomer.does("delete", "--force", "watched")
    until(lambda: newcomer.manager is None, "the manager leaves")


def test_killing_the_manager_loses_nothing(newcomer: Person) -> None:
    newcomer.does("create", "web", "--spec", str(newcomer.spec), "-H", "simulated")
    operation = newcomer.does("start", "web", "--no-wait")
    newcomer.kill_manager()
    assert newcomer.does("operations", "wait", operation) == "start of web has succeeded"
    assert newcomer.says("show", "web", "--json").json["state"] == "running"


def test_a_command_that_waits_goes_on_with_the_next_manager(newcomer: Person) -> None:
    newcomer.does("create", "web", "--spec", str(newcomer.spec), "-H", "slow")
    first = newcomer.manager
    waiting = newcomer.begins("start", "web", "--json")
    _until_it_boots(newcomer, "web")
    newcomer.kill_manager()
    # The one that waits has found nobody and has started another.
    until(lambda: newcomer.manager not in {None, first}, "the command starts a manager")
    (operation,) = newcomer.says("operations", "list", "--kind", "machine.start", "--json").json
    newcomer.does("operations", "cancel", operation["id"])
    status, out, err = ended(waiting)
    assert operation["id"] in out, err
    assert status == 3
    assert "was cancelled" in err


def _until_it_boots(person: Person, machine: str) -> None:
    until(
        lambda: person.says("show", machine, "--json").json["state"] == "starting",
        f"{machine} boots",
    )


def _until_it_is_watched(person: Person) -> None:
    """Whoever asked for the start knows of its operation, and has asked how it goes."""
    (operation,) = person.says("operations", "list", "--kind", "machine.start", "--json").json
    log = person.home / "manager" / "manager.log"
    until(lambda: f"/v1/operations/{operation['id']}" in log.read_text(), "it is watched")


def test_killing_a_command_loses_nothing(newcomer: Person) -> None:
    newcomer.does("create", "web", "--spec", str(newcomer.spec), "-H", "slow")
    starting = newcomer.begins("start", "web")
    _until_it_boots(newcomer, "web")
    starting.kill()
    ended(starting)
    (operation,) = newcomer.says("operations", "list", "--kind", "machine.start", "--json").json
    assert operation["state"] == "running"
    newcomer.does("operations", "cancel", operation["id"])
    newcomer.says("operations", "wait", operation["id"])
    assert newcomer.says("show", "web", "--json").json["state"] == "created"


def test_ctrl_c_has_the_operation_undone_and_says_so(newcomer: Person) -> None:
    newcomer.does("create", "web", "--spec", str(newcomer.spec), "-H", "slow")
    starting = newcomer.begins("start", "web")
    _until_it_boots(newcomer, "web")
    starting.send_signal(signal.SIGINT)
    status, out, err = ended(starting)
    assert (status, out) == (130, ""), err
    assert "asked the manager to cancel start of web" in err
    assert "start of web was cancelled" in err
    assert newcomer.says("show", "web", "--json").json["state"] == "created"


def test_a_second_ctrl_c_leaves_it_to_itself(newcomer: Person) -> None:
    newcomer.does("create", "web", "--spec", str(newcomer.spec), "-H", "slow")
    starting = newcomer.begins("start", "web")
    _until_it_boots(newcomer, "web")
    _until_it_is_watched(newcomer)
    # The manager does not answer now: it takes no notice of the first one.
    found = newcomer.manager
    assert found is not None
    os.kill(found.pid, signal.SIGSTOP)
    try:
        starting.send_signal(signal.SIGINT)
        starting.send_signal(signal.SIGTERM)
        status, _, err = ended(starting)
    finally:
        os.kill(found.pid, signal.SIGCONT)
    assert status == 130
    assert "start of web goes on" in err
    newcomer.does("delete", "--force", "web", "--no-wait")


def test_serve_takes_the_place_of_the_one_in_the_background(newcomer: Person) -> None:
    newcomer.does("list")
    background = newcomer.manager
    served = newcomer.says("serve", "--stop")
    assert served.out.endswith("has ended\n")
    assert newcomer.says("serve", "--stop").out == "no manager runs\n"
    newcomer.does("list")
    serving = newcomer.begins("serve", "--port", "0")
    assert serving.stdout is not None
    urls = [serving.stdout.readline().decode().strip() for _ in range(2)]
    try:
        assert urls[0].startswith("unix:")
        assert urls[1].startswith("http://127.0.0.1:")
        found = newcomer.manager
        assert found is not None
        assert found != background
        assert not found.background
        assert found.urls == tuple(urls)
        twice = newcomer.runs("serve")
        assert twice.status == 3
        assert f"process {found.pid}" in twice.err
        _over_tcp(newcomer, urls[1])
    finally:
        serving.terminate()
        status, _, err = ended(serving)
    assert status == 0, err
    assert newcomer.manager is None


def _over_tcp(person: Person, url: str) -> None:
    """Whoever comes over TCP has to have a token, and may do what it is for."""
    token = person.does("token", "create", "reader", "--scope", "read")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VMLAB_URL", url)
        nobody = person.says("list")
        assert nobody.status == 3
        assert "VMLAB_TOKEN" in nobody.err
        environment.setenv("VMLAB_TOKEN", token)
        assert "no machines" in person.does("list")
        refused = person.says("disk", "create", "data", "1M")
        assert refused.status == 3
        assert "operate" in refused.err
        environment.setenv("VMLAB_URL", "http://127.0.0.1:1")
        gone = person.says("list")
        assert gone.status == 4
        assert "does not answer" in gone.err


def test_serve_with_tls(newcomer: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate, key = _certificate(tmp_path)
    told = newcomer.runs(
        "serve", "--detach", "--port", "0", "--host", "0.0.0.0", "--json",
        "--tls-cert", str(certificate), "--tls-key", str(key),
        "--socket", str(newcomer.home / "other.sock"),
    )  # fmt: skip
    assert told.status == 0, told
    _, other, url = told.json["urls"]
    assert other == f"unix:{newcomer.home / 'other.sock'}"
    assert url.startswith("https://0.0.0.0:")
    token = newcomer.does("token", "create", "laptop")
    monkeypatch.setenv("VMLAB_URL", other)
    newcomer.does("disk", "create", "data", "1M")
    monkeypatch.setenv("VMLAB_URL", url.replace("0.0.0.0", "localhost"))
    monkeypatch.setenv("VMLAB_TOKEN", token)
    unknown = newcomer.says("disk", "list")
    assert unknown.status == 4, "a certificate that nobody knows is refused"
    assert "SSL_CERT_FILE" in unknown.err
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert "data" in newcomer.does("disk", "list")
    monkeypatch.delenv("VMLAB_URL")


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for localhost, and its key, by openssl(1)."""
    import subprocess

    certificate, key = directory / "cert.pem", directory / "key.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost",
            "-keyout", str(key), "-out", str(certificate),
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return certificate, key


def test_a_manager_that_cannot_begin_says_why(
    newcomer: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMLAB_WORKERS", "many")
    said = newcomer.says("list")
    assert said.status == 2
    assert "VMLAB_WORKERS" in said.err
    monkeypatch.delenv("VMLAB_WORKERS")
    monkeypatch.setenv("VMLAB_LINGER_SECONDS", "never")
    said = newcomer.says("list")
    assert said.status == 2
    assert "VMLAB_LINGER_SECONDS" in said.err
    assert newcomer.manager is None
    monkeypatch.setenv("VMLAB_LINGER_SECONDS", "600")


def test_a_program_has_it_begun_as_well(newcomer: Person) -> None:
    with Client.connect() as client:
        client.disks.create("data", size="1M")
        assert [disk.name for disk in client.disks.list()] == ["data"]
    assert newcomer.manager is not None
    assert newcomer.does("disk", "list", "--json").count('"data"') == 1


def test_a_unix_socket_that_nobody_serves_is_no_reason_to_begin_one(
    newcomer: Person, tmp_path: Path
) -> None:
    with (
        Client.connect(f"unix:{tmp_path}/none.sock") as client,
        pytest.raises(Unreachable, match=r"none\.sock"),
    ):
        client.machines.list()
    assert newcomer.manager is None
    assert AsyncClient.connect("http://lab:1").sender.address.home is None
