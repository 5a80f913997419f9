"""The manager's commands: whose a machine is, what options mean, how changes are shown."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmlab.cli.exit_codes import ExitCode
from vmlab.cli.main import COMMANDS, main
from vmlab.cli.manager import archives, changing, choice, completing, options
from vmlab.cli.manager.changing import How, change, doing, request
from vmlab.cli.manager.connecting import ExtraMissing, extra
from vmlab.hypervisors.ownership import Home
from vmlab.machine.errors import (
    CorruptSnapshot,
    InvalidSpec,
    MachineNotFound,
    OperationFailed,
    ResourceExhausted,
    VmlabError,
)
from vmlab.manager.documents import OperationDocument, OperationState, StepDocument

# -------------------------------------------------------------------------- without the extra


@pytest.mark.parametrize(
    "words",
    [
        ["list"], ["create", "x", "--image", "tiny"], ["serve"], ["disk", "list"],
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_without_the_extra_a_command_says_what_to_install(words: list[str]) -> None:
    code = (
        "import sys\n"
        "for name in ('httpx', 'sqlalchemy', 'fastapi', 'uvicorn', 'websockets', 'structlog'):\n"
        "    sys.modules[name] = None\n"
        "from vmlab.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == ExitCode.UNAVAILABLE, done.stderr
    assert "which is not installed" in done.stderr
    assert "hint: pip install 'vmlab[manager]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_module_that_is_missing_is_a_mistake_of_ours() -> None:
    with pytest.raises(ModuleNotFoundError), extra():
        raise ModuleNotFoundError("no module", name="vmlab.nothing")
    with pytest.raises(ExtraMissing) as missing, extra():
        raise ModuleNotFoundError("no module", name="psycopg.pq")
    assert missing.value.hint == "pip install 'vmlab[manager,postgres]'"


# ------------------------------------------------------------------------------ whose it is


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Say which machines are kept, and which the manager has."""

    def arrange(kept: set[str], managed: set[str] | VmlabError) -> None:
        def found(names: list[str]) -> set[str]:
            if isinstance(managed, VmlabError):
                raise managed
            return set(names) & managed

        monkeypatch.setattr(choice, "_is_kept", lambda name: name in kept)
        monkeypatch.setattr(choice, "_managed", found)

    return arrange


def test_each_machine_is_found_where_it_is(stores: Callable[..., None]) -> None:
    stores({"a"}, {"b"})
    assert choice.keepers(["a", "b"]) == {"a": "kept", "b": "manager"}


def test_a_name_that_both_have_is_nobody_s_until_it_is_said(stores: Callable[..., None]) -> None:
    stores({"a"}, {"a"})
    with pytest.raises(VmlabError, match="two machines 'a'") as raised:
        choice.keepers(["a"])
    assert "--store kept" in (raised.value.hint or "")
    assert choice.keepers(["a"], "kept") == {"a": "kept"}
    assert choice.keepers(["a"], "manager") == {"a": "manager"}
    assert choice.keepers(["a"], None, "qemu") == {"a": "kept"}


def test_a_name_that_nobody_has(stores: Callable[..., None]) -> None:
    stores(set(), set())
    with pytest.raises(MachineNotFound, match="no machine 'a'"):
        choice.keepers(["a"])


def test_a_kept_machine_can_be_used_though_the_manager_is_away(
    stores: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    stores({"a"}, VmlabError("the manager does not answer"))
    assert choice.keepers(["a"]) == {"a": "kept"}
    assert "does not answer; whether it has" in capsys.readouterr().err
    with pytest.raises(VmlabError, match="does not answer"):
        choice.keepers(["b"])


def test_no_manager_is_begun_for_a_home_that_never_had_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    Home.open()
    assert main(["delete", "nobody"]) == 3
    assert not (tmp_path / "home" / "manager").exists()


@pytest.mark.parametrize(
    "words", [["shell", "x"], ["console", "x"], ["copy", "x:/a", "b"], ["exec", "x", "--", "true"]]
)
def test_commands_for_both_stores_ask_whose_it_is(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(choice, "_is_kept", lambda name: True)
    monkeypatch.setattr(choice, "_managed", set)
    assert main(words) == 3
    assert "there are two machines 'x'" in capsys.readouterr().err


# ------------------------------------------------------------------------------ what options mean


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30), ("1.5m", 90), ("6h", 21600), ("7d", 604800), ("2 w", 1209600)],
)
def test_times(text: str, seconds: float) -> None:
    assert options.duration("--expires", text, command="snapshot") == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1y", "9" * 30 + "w"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec) as refused:
        options.duration("--expires", text, command="snapshot")
    assert refused.value.problems[0].field == "--expires"
    assert refused.value.hint == "`vmlab snapshot --help` shows what it takes"


def test_a_moment_is_that_long_from_now() -> None:
    assert options.moment("--expires", None, command="snapshot") is None
    found = options.moment("--expires", "1d", command="snapshot")
    assert found is not None
    assert timedelta(hours=23) < found - datetime.now(UTC) <= timedelta(days=1)


def test_a_moment_that_no_calendar_has_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["snapshot", "a", "--expires", "99999999w"]) == 2
    error = capsys.readouterr().err
    assert "--expires" in error
    assert "a time before the year 10000" in error
    assert "`vmlab snapshot --help`" in error


def test_interfaces_and_labels() -> None:
    texts = ["user", "lan,address=10.0.0.5,mac=52:54:00:00:00:01,name=eth"]
    assert options.nics(texts, command="create") == [
        {"network": "user"},
        {"network": "lan", "address": "10.0.0.5", "mac": "52:54:00:00:00:01", "name": "eth"},
    ]
    assert options.labels("--label", ["a=b=c", "d"], command="create") == {"a": "b=c", "d": ""}
    with pytest.raises(InvalidSpec):
        options.nics(["lan,10.0.0.5"], command="create")


def test_policy_and_metadata_say_only_what_was_said(tmp_path: Path) -> None:
    assert options.policy(command="update") == {}
    assert options.policy(
        command="update", autostart=True, snapshot_every="1h", findings=["clock-drift=report"]
    ) == {
        "autostart": True,
        "snapshot_every": timedelta(hours=1),
        "findings": {"clock-drift": "report"},
    }
    keys = tmp_path / "keys"
    keys.write_text("ssh-ed25519 AAAA one\n\nssh-ed25519 BBBB two\n")
    assert options.metadata(command="update") == {}
    assert options.metadata(command="update", hostname="web", ssh_keys=[keys]) == {
        "hostname": "web",
        "ssh_keys": ("ssh-ed25519 AAAA one", "ssh-ed25519 BBBB two"),
    }
    keys.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidSpec, match="it is no text"):
        options.metadata(command="update", ssh_keys=[keys])


def test_ages() -> None:
    now = datetime.now(UTC)
    assert options.ago(None) == "-"
    assert options.ago(now + timedelta(seconds=5)) == "0s"
    assert options.ago(now - timedelta(minutes=5)) == "5m"
    assert options.ago(now - timedelta(days=3)) == "3d"


# ------------------------------------------------------------------------------ changes


def operation(state: OperationState, **more: Any) -> OperationDocument:
    fields: dict[str, Any] = {
        "id": "1" * 32, "kind": "machine.start", "state": state, "target_name": "web",
        "request": {}, "created": datetime.now(UTC),
        "ended": datetime.now(UTC) if state in {"succeeded", "failed", "cancelled"} else None,
    }  # fmt: skip
    return OperationDocument.model_validate(fields | more)


class Fake:
    """A client whose manager does what it is told to."""

    def __init__(self, end: OperationDocument | Callable[[], OperationDocument]) -> None:
        self.end = end
        self.cancelled: list[str] = []
        self.going = asyncio.Event()
        self.operations = self

    async def submit(self, wanted: object, **how: object) -> OperationDocument:
        return operation("running")

    async def wait(self, id_: str, **how: Any) -> OperationDocument:
        if callable(self.end):
            # As somebody who presses Ctrl-C while it goes on.
            os.kill(os.getpid(), signal.SIGINT)
            await self.going.wait()
            return self.end()
        await how["watch"](operation("running"))
        return self.end

    async def cancel(self, id_: str) -> OperationDocument:
        self.cancelled.append(id_)
        self.going.set()
        return operation("running", cancelling=True)


def changed(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, how: How | None = None, count: int = 1
) -> int:
    monkeypatch.setattr(changing, "ask", lambda body: asyncio.run(body(fake)))
    wanted = [request("StartMachine", machine="web") for _ in range(count)]
    return change(wanted, how or How(), lambda each: f"{each.target_name} runs")


def test_what_was_done_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert changed(Fake(operation("succeeded")), monkeypatch) == 0
    assert capsys.readouterr().out == "web runs\n"


def test_what_failed_is_raised_as_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    error = ResourceExhausted("no memory is left", hint="stop another")
    with pytest.raises(ResourceExhausted, match="no memory is left"):
        changed(Fake(operation("failed", error=error.to_record())), monkeypatch)


def test_of_several_each_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    error = OperationFailed("it broke").to_record()
    assert changed(Fake(operation("failed", error=error)), monkeypatch, count=2) == 3
    assert capsys.readouterr().err.count("error: it broke") == 2


def test_ctrl_c_cancels_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undone = StepDocument(name="boot", state="undone")
    fake = Fake(lambda: operation("cancelled", steps=[undone]))
    assert changed(fake, monkeypatch) == ExitCode.INTERRUPTED
    assert fake.cancelled == ["1" * 32]
    err = capsys.readouterr().err
    assert "asked the manager to cancel start of web" in err
    assert "start of web was cancelled; 1 of its steps were undone" in err


def test_ctrl_c_says_so_even_if_the_end_is_told_before_the_cancelling(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Late(Fake):
        async def cancel(self, id_: str) -> OperationDocument:
            cancelling = await super().cancel(id_)
            for _ in range(100):
                await asyncio.sleep(0)
            return cancelling

    assert changed(Late(lambda: operation("cancelled")), monkeypatch) == ExitCode.INTERRUPTED
    said = capsys.readouterr().err.partition("asked the manager to cancel start of web")
    assert "start of web was cancelled" in said[2]


def test_ctrl_c_that_comes_too_late_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert changed(Fake(lambda: operation("succeeded")), monkeypatch) == 0
    assert capsys.readouterr().out == "web runs\n"


def test_what_an_operation_does_now() -> None:
    running = StepDocument(name="boot", state="running", text="boot it")
    assert doing(operation("queued")) == "queued"
    assert doing(operation("running", steps=[running])) == "boot it"
    assert doing(operation("running", steps=[running], message="waits")) == "waits"
    assert doing(operation("running", steps=[running], cancelling=True)) == (
        "being cancelled: boot it"
    )


def test_progress_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from vmlab.cli import output

    monkeypatch.setattr(changing, "_SHOWN_AFTER", 0)
    monkeypatch.setattr(changing, "_REDRAWN", 0.01)
    console = output.console(stderr=True)
    console.record = True
    monkeypatch.setattr(output, "console", lambda **which: console)
    drawn = asyncio.Event()
    real = changing.doing

    def looked(each: OperationDocument) -> str:
        drawn.set()
        return real(each)

    monkeypatch.setattr(changing, "doing", looked)

    async def drawing() -> None:
        going = {0: operation("running", progress=0.5, message="boots")}
        task = asyncio.ensure_future(changing._draw(going))
        await asyncio.wait_for(drawn.wait(), 60)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(drawing())


# ------------------------------------------------------------------------------ completion


def test_names_are_completed_and_nothing_is_begun_for_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(completing, "_names", lambda noun: ["web", "www", "db"])
    assert completing.completed("machines")("w") == ["web", "www"]
    monkeypatch.undo()
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    assert completing.completed("machines")("") == []
    assert not (tmp_path / "home" / "manager" / "service.lock").exists()


def test_the_table_of_commands_has_all_that_the_manager_can_be_asked() -> None:
    names = {entry.name for entry in COMMANDS}
    wanted = {
        "create", "launch", "start", "stop", "pause", "resume", "restart", "delete", "list",
        "show", "exec", "shell", "console", "copy", "snapshot", "restore", "clone", "migrate",
        "disk", "network", "template", "events", "findings", "operations", "host", "token",
        "serve", "emergency-stop", "export", "import", "update", "resize",
    }  # fmt: skip
    assert wanted <= names


def test_a_request_leaves_out_what_was_not_said() -> None:
    wanted = request("CreateMachine", name="a", image="i", labels={}, disks=(), memory=None)
    assert wanted.model_fields_set == {"name", "image"}


# ------------------------------------------------------------------------------ files of machines


def test_a_file_that_is_no_exported_machine_is_refused_by_its_own_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    file = tmp_path / "passwd"
    file.write_text("root:x:0:0:root:/root:/bin/sh\n" * 100)
    assert main(["import", str(file)]) == 3
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {file} is no machine that was exported by vmlab: it is not a sound tar archive"
    )
    # Nobody was asked for anything.
    assert not (tmp_path / "home").exists()


@pytest.fixture
def refused_as(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[str], VmlabError]], None]:
    """Has imports refused with what is made of the name that their file has at the manager."""

    def set_up(made: Callable[[str], VmlabError]) -> None:
        def refuse(requests: list[Any], how: How, told: object, *, after: object) -> int:
            raise made(requests[0].path)

        monkeypatch.setattr(archives, "change", refuse)
        monkeypatch.setattr("vmlab.manager.machine_archive.read_manifest", lambda file: None)

    return set_up


def test_what_a_manager_says_of_a_file_names_it_as_its_user_does(
    tmp_path: Path,
    refused_as: Callable[[Callable[[str], VmlabError]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    exports = tmp_path / "home" / "manager" / "exports"
    refused_as(
        lambda name: CorruptSnapshot(
            f"{exports / name} is no machine: a digest differs", hint="export it anew"
        )
    )
    monkeypatch.setenv("VMLAB_HOME", str(tmp_path / "home"))
    exports.parent.mkdir(parents=True)
    file = tmp_path / "a machine.tar"
    file.write_bytes(b"whatever")
    assert main(["import", str(file)]) == 3
    error = capsys.readouterr().err
    assert error.splitlines()[0] == f"error: {file} is no machine: a digest differs"


def test_what_cannot_be_removed_afterwards_does_not_hide_how_an_import_ended(
    tmp_path: Path,
    refused_as: Callable[[Callable[[str], VmlabError]], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Exports:
        async def upload(self, name: str, file: Path) -> None:
            assert file.name == "a.tar"

        async def delete(self, name: str) -> None:
            raise VmlabError("the manager does not answer")

    refused_as(lambda name: OperationFailed(f"/srv/exports/{name} cannot be unpacked"))
    client = SimpleNamespace(exports=Exports())
    monkeypatch.setenv("VMLAB_URL", "http://nowhere")
    monkeypatch.setattr(archives, "ask", lambda body: asyncio.run(body(client)))
    file = tmp_path / "a.tar"
    file.write_bytes(b"whatever")
    assert main(["import", str(file)]) == 3
    error = capsys.readouterr().err
    assert f"error: {file} cannot be unpacked" in error
    assert "stays among the manager's exports for a week: the manager does not answer" in error
