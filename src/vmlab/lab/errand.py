"""What `vmlab run` does with a machine that answers: the command, then the copies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmlab.lab.passthrough import run_here
from vmlab.lab.session import Interrupts, Session, split_boot
from vmlab.lab.terminal import on_terminal, run_on_terminal
from vmlab.machine.errors import InvalidSpec, SpecProblem


@dataclass(frozen=True, slots=True)
class Errand:
    """A command of words, and what is copied out after it: guest paths and places here.

    `detailed` has the guest asked where the time of its boot went.
    """

    words: tuple[str, ...]
    copies: tuple[tuple[str, Path], ...] = ()
    detailed: bool = False

    async def run(self, session: Session, interrupts: Interrupts) -> int:
        """Do it; returns the command's exit status.

        Raises:
            MachineCrashed: the guest died meanwhile.
            ResourceNotFound: there is nothing to copy out.
        """
        if self.detailed:
            await split_boot(session)
        with session.timeline.step("command"):
            if on_terminal():
                status = await run_on_terminal(session, self.words)
            else:
                status = await run_here(session, interrupts, self.words)
        if self.copies:
            with session.timeline.step("copy out"):
                for source, target in self.copies:
                    await session.guest.copy_out(source, target)
        return status


def parse_copy_out(text: str) -> tuple[str, Path]:
    """A path in the guest and the place for it here, from "/PATH[:HERE]".

    Raises:
        InvalidSpec: it is none, or the place is taken.
    """
    source, _, place = text.partition(":")
    target = Path(place or PurePosixPath(source).name).expanduser()
    if place and target.is_dir():
        target /= PurePosixPath(source).name
    pure = PurePosixPath(source)
    if not pure.is_absolute() or not pure.name or ".." in pure.parts:
        wrong = 'an absolute path in the guest, such as "/root/results" or "/root/results:here"'
    elif target.exists() or target.is_symlink():
        wrong = f"a place that is free: {str(target)!r} exists already"
    else:
        return source, target
    raise InvalidSpec([SpecProblem("--copy-out", text, wrong)], what="command line")
