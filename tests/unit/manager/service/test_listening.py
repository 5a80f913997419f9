"""Where a manager answers: what is refused, who may open its socket, what is left behind."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from vmlab.machine.errors import InvalidSpec, OperationFailed
from vmlab.manager.client.background import answers
from vmlab.manager.service.listening import Listening, UnixListener, tcp_listener


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    file = tmp_path / "pem"
    file.touch()
    return file


def test_this_host_alone_needs_nothing_more() -> None:
    Listening().check()
    Listening(port=0).check()
    Listening("::1", 8080).check()


def test_other_hosts_need_tls(pem: Path) -> None:
    with pytest.raises(InvalidSpec, match="--tls-cert and --tls-key"):
        Listening("0.0.0.0", 0).check()
    Listening("0.0.0.0", 0, certificate=pem, key=pem).check()


def test_options_that_need_another(pem: Path) -> None:
    cases = {
        "--host": Listening("0.0.0.0"),
        "--tls-cert": Listening(port=0, certificate=pem),
        "--tls-key": Listening(port=0, key=pem),
    }
    for option, listening in cases.items():
        with pytest.raises(InvalidSpec) as refused:
            listening.check()
        assert refused.value.problems[0].field == option
    with pytest.raises(InvalidSpec, match="a file that exists"):
        Listening(port=0, certificate=pem, key=Path("/no/such/key")).check()
    with pytest.raises(InvalidSpec, match="needs --port"):
        Listening(certificate=pem, key=pem).check()


def test_a_socket_is_its_user_s_alone_and_goes_with_it(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        listener = UnixListener(tmp_path / "s")
    finally:
        os.umask(before)
    assert listener.path.stat().st_mode & 0o777 == 0o600
    assert answers(listener.path)
    listener.close()
    listener.close()
    assert not listener.path.exists()
    assert not answers(listener.path)


def test_a_socket_that_nobody_answers_at_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    listener = UnixListener(tmp_path / "s")
    with pytest.raises(OperationFailed, match="somebody answers"):
        UnixListener(tmp_path / "s")
    listener.close()


def test_what_is_no_socket_stays(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(OperationFailed, match="is no socket"):
        UnixListener(tmp_path / "s")
    assert (tmp_path / "s").read_text() == "precious"


def test_another_s_socket_in_its_place_is_not_removed(tmp_path: Path) -> None:
    first = UnixListener(tmp_path / "s")
    first.path.unlink()
    second = UnixListener(tmp_path / "s")
    first.close()
    assert answers(second.path)
    second.close()


def test_a_place_that_cannot_be_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(OperationFailed, match="cannot make the socket"):
        UnixListener(tmp_path / "nowhere" / "s")
    with pytest.raises(OperationFailed, match="too long a path"):
        UnixListener(tmp_path / ("x" * 120))


def test_a_port_that_is_taken() -> None:
    with tcp_listener("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert port > 0
        with pytest.raises(OperationFailed, match=f"port {port}") as taken:
            tcp_listener("127.0.0.1", port)
    assert "--port 0" in (taken.value.hint or "")


def test_an_address_of_another_host() -> None:
    with pytest.raises(OperationFailed, match="cannot listen") as refused:
        tcp_listener("192.0.2.1", 0)
    assert "an address of this host" in (refused.value.hint or "")
