"""``vmlab image`` as a user types it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
from rich.progress import TaskID

from vmlab.cli import image as command
from vmlab.images import ImageStore, ProgressEvent
from vmlab.images.errors import ImageNotFound
from vmlab.images.progress import watched
from vmlab.images.settings import ImageSettings


@pytest.fixture
def vmlab_image(
    make_store: Callable[..., ImageStore], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs ``vmlab image ARGUMENTS`` on the small archive's store; returns the exit status."""
    settings = make_store().settings

    def load(environment: object = None) -> ImageSettings:
        return settings

    monkeypatch.setattr("vmlab.images.settings.load", load)
    group = typer.main.get_command(command.app)

    def run(*arguments: str) -> int:
        with group.make_context("vmlab image", list(arguments)) as context:
            result = group.invoke(context)
        return int(result or 0)

    return run


def test_build_list_show_verify_remove(
    vmlab_image: Callable[..., int], recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vmlab_image("build", str(recipe_file), "--json") == 0
    out, err = capsys.readouterr()
    row = json.loads(out)
    assert row["name"] == "small-tiny"
    assert Path(row["kernel"]).is_file()
    assert "fetching busybox-static_1.0_riscv64.deb (0." in err
    assert vmlab_image("list") == 0
    table = capsys.readouterr().out
    assert "small-tiny" in table
    assert row["digest"][:12] in table
    assert vmlab_image("show", row["digest"][:8]) == 0
    assert row["files"]["initrd"]["sha256"] in capsys.readouterr().out
    assert vmlab_image("verify") == 0
    assert "as it was written" in capsys.readouterr().out
    assert vmlab_image("remove", "small-tiny") == 0
    assert vmlab_image("list", "--json") == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2]) == []


def test_verify_names_the_changed_file_and_fails(
    vmlab_image: Callable[..., int], recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vmlab_image("build", str(recipe_file), "--json")
    initrd = Path(json.loads(capsys.readouterr().out)["initrd"])
    initrd.chmod(0o644)
    initrd.write_bytes(b"x" * initrd.stat().st_size)
    assert vmlab_image("verify", "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)
    assert str(initrd) in problem["problem"]


def test_build_check_compares_with_a_second_build(
    vmlab_image: Callable[..., int], recipe_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert vmlab_image("build", str(recipe_file), "--check") == 0
    assert "the same bytes" in capsys.readouterr().out


def test_import_and_prune(
    vmlab_image: Callable[..., int],
    tmp_path: Path,
    forms: dict[str, Callable[..., bytes]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernel = tmp_path / "Image"
    kernel.write_bytes(forms["riscv"]())
    assert vmlab_image("import", "mine", "--kernel", str(kernel), "--channel", "console") == 0
    assert "riscv64" in capsys.readouterr().out
    assert vmlab_image("prune", "--all", "--json") == 0
    assert json.loads(capsys.readouterr().out)["images"] == []
    assert vmlab_image("show", "mine", "--json") == 0
    assert json.loads(capsys.readouterr().out)["origin"] == "import"


@pytest.mark.parametrize(
    "arguments",
    [
        ("import", "x", "--size", "much"),
        ("import", "x", "--architecture", "sparc"),
        ("import", "x", "--channel", "telnet"),
        ("prune", "some"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    vmlab_image: Callable[..., int], arguments: tuple[str, ...]
) -> None:
    with pytest.raises(typer.TyperException) as caught:
        vmlab_image(*arguments)
    assert caught.value.exit_code == 2


def test_recipe_can_be_printed_and_read_again(
    vmlab_image: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    from vmlab.images import recipe

    assert vmlab_image("show", "debian-12-amd64-tiny", "--recipe") == 0
    text = capsys.readouterr().out
    assert recipe.parse(text) == recipe.builtin("debian-12-amd64-tiny")
    assert vmlab_image("list", "--all") == 0
    assert "debian-13-ppc64el-tiny" in capsys.readouterr().out


def test_image_that_is_not_there_is_told_from_one_that_does_not_exist(
    vmlab_image: Callable[..., int],
) -> None:
    with pytest.raises(ImageNotFound, match="is not in the store") as caught:
        vmlab_image("show", "debian-12-amd64-tiny")
    assert "vmlab image build" in (caught.value.hint or "")
    with pytest.raises(ImageNotFound, match="no image or recipe"):
        vmlab_image("show", "debian-99")


def test_bars_are_drawn_on_a_terminal_and_lines_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    events = [
        ProgressEvent("fetching a", 1 << 20, 2 << 20),
        ProgressEvent("fetching a", 2 << 20, 2 << 20, finished=True),
        ProgressEvent("assembling [b]"),
        ProgressEvent("assembling [b]", finished=True),
        ProgressEvent("installing", 17, 85, unit="packages"),
        ProgressEvent("installing", 85, 85, unit="packages", finished=True),
    ]
    with command.progress_bars() as progress:
        for event in events:
            progress(event)
    assert capsys.readouterr().err == "fetching a (2.0 MiB)\nassembling [b]\ninstalling\n"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with command.progress_bars() as progress:
        for event in events:
            progress(event)
    drawn = capsys.readouterr().err
    assert "2.0/2.0 MiB" in drawn
    assert "85/85 packages" in drawn
    assert "assembling [b]" in drawn


def test_what_is_counted_has_its_rate_in_its_own_unit() -> None:
    from rich.progress import Task

    from vmlab.cli.amounts import AmountColumn, RateColumn

    def drawn(completed: int, total: int | None, unit: str) -> tuple[str, str]:
        task = Task(TaskID(0), "x", total, completed, _get_time=lambda: 0.0, fields={"unit": unit})
        task.finished_speed = 2.5
        return AmountColumn().render(task).plain, RateColumn().render(task).plain

    assert drawn(17, 85, "packages") == ("17/85 packages", "2.5/s")
    assert drawn(17, None, "packages") == ("17/? packages", "2.5/s")
    assert drawn(1 << 20, 2 << 20, "bytes")[0] == "1.0/2.0 MiB"
    assert drawn(0, None, "bytes") == ("", "")


def test_watched_step_is_told_at_its_beginning_again_and_at_its_end(
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    events: list[ProgressEvent] = []
    done = 0

    def measure() -> tuple[int, int | None]:
        if done == 2:
            raise FileNotFoundError
        return done, 10

    with watched("step", events.append, measure):
        assert events == [ProgressEvent("step", 0, 10)]
        done = 5
        wait_until(lambda: ProgressEvent("step", 5, 10) in events)
        done = 2  # what is measured is not there: the last answer counts
        seen = len(events)
        wait_until(lambda: len(events) > seen + 1)
    assert set(events[seen + 1 : -1]) <= {ProgressEvent("step", 5, 10)}
    assert events[-1] == ProgressEvent("step", 10, 10, finished=True)


def test_watched_step_that_fails_is_not_told_to_be_finished() -> None:
    events: list[ProgressEvent] = []
    with pytest.raises(ZeroDivisionError), watched("step", events.append):
        raise ZeroDivisionError
    assert not any(event.finished for event in events)
