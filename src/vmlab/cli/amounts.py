"""Progress bars that count bytes or anything else: how much is done, and how fast.

Not which bars there are: that is for the command that draws them. Imports rich, so it is imported
when the first bar is drawn.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.text import Text

__all__ = ["AmountColumn", "RateColumn", "work_bars"]


class AmountColumn(ProgressColumn):
    """ "2.0/7.5 MiB" or "12/85 packages"; nothing for a step that counts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn(binary_units=True)

    def render(self, task: Task) -> Text:
        """The amount of a task; its field `unit` says of what."""
        if not task.completed and task.total is None:
            return Text("")
        unit = task.fields.get("unit", "bytes")
        if unit == "bytes":
            return self._bytes.render(task)
        total = "?" if task.total is None else int(task.total)
        return Text(f"{int(task.completed)}/{total} {unit}", style="progress.download")


class RateColumn(ProgressColumn):
    """ "3.1 MB/s" or "2.5/s"."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = TransferSpeedColumn()

    def render(self, task: Task) -> Text:
        """The rate of a task; its field `unit` says of what."""
        if not task.completed:
            return Text("")
        if task.fields.get("unit", "bytes") == "bytes":
            return self._bytes.render(task)
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s", style="progress.data.speed")


def work_bars(console: Console) -> Progress:
    """Bars for steps of long work, each with its amount, its rate and its time; none drawn yet."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        AmountColumn(),
        RateColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=False,
    )
