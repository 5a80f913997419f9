"""The frame of the command line: the table of commands, the global options, errors, exit status.

What a command does is in its own module, which is imported when that command is called and not
before: ``vmlab --help`` reads this table alone. A command module exports a function with typer's
annotations, or a ``typer.Typer`` where the command has subcommands; it prints through
`vmlab.cli.output` and raises `VmlabError` for what cannot be done. A function that returns an
`ExitCode` (or an int) exits with it.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
import typer.main
from typer.core import TyperGroup

from vmlab import __version__
from vmlab.cli import output
from vmlab.cli.exit_codes import ExitCode

__all__ = ["COMMANDS", "CommandEntry", "main"]


@dataclass(frozen=True, slots=True)
class CommandEntry:
    """One command: where it lives and what the list of commands says about it."""

    name: str
    module: str
    attribute: str
    help: str
    panel: str


_GUESTS = "Guests"
_STAY = "Machines that stay"
_PROVE = "Prove and break"
_LOOK = "Look around and tidy up"

COMMANDS: tuple[CommandEntry, ...] = (
    CommandEntry(
        "hypervisors",
        "vmlab.cli.hypervisors",
        "hypervisors",
        "List the hypervisors, what each can do here, and why not.",
        _LOOK,
    ),
    CommandEntry(
        "doctor",
        "vmlab.cli.doctor",
        "doctor",
        "Explain this host: accelerators, memory, permissions, what to install.",
        _LOOK,
    ),
    CommandEntry(
        "schema",
        "vmlab.cli.schema",
        "schema",
        "Print the JSON Schema of a file that vmlab reads or writes.",
        _LOOK,
    ),
    CommandEntry(
        "clean",
        "vmlab.cli.clean",
        "clean",
        "Remove what dead runs left: processes, mounts, sockets, files.",
        _LOOK,
    ),
    CommandEntry(
        "run",
        "vmlab.cli.run",
        "run",
        "Boot a machine, run a command in it as if it ran here, and clear it away.",
        _GUESTS,
    ),
    CommandEntry(
        "shell",
        "vmlab.cli.shell",
        "shell",
        "Open a shell in a machine that is there, or in a fresh one.",
        _GUESTS,
    ),
    CommandEntry(
        "console",
        "vmlab.cli.console",
        "console",
        "Attach to the serial console of a machine.",
        _GUESTS,
    ),
    CommandEntry(
        "copy",
        "vmlab.cli.copy",
        "copy",
        "Copy files and directories between here and a machine.",
        _GUESTS,
    ),
    CommandEntry(
        "delete",
        "vmlab.cli.delete",
        "delete",
        "Delete machines.",
        _GUESTS,
    ),
    CommandEntry(
        "image",
        "vmlab.cli.image",
        "app",
        "Build, import, list, show, verify, remove and prune images for guests.",
        _GUESTS,
    ),
    CommandEntry(
        "create",
        "vmlab.cli.manager.making",
        "create",
        "Make a machine that outlives this command.",
        _STAY,
    ),
    CommandEntry(
        "launch",
        "vmlab.cli.manager.making",
        "launch",
        "Make a machine, start it, and wait until its guest answers.",
        _STAY,
    ),
    CommandEntry(
        "start",
        "vmlab.cli.manager.living",
        "start",
        "Boot machines.",
        _STAY,
    ),
    CommandEntry(
        "stop",
        "vmlab.cli.manager.living",
        "stop",
        "Shut machines down; a guest that does not listen is ended.",
        _STAY,
    ),
    CommandEntry(
        "restart",
        "vmlab.cli.manager.living",
        "restart",
        "Boot machines again.",
        _STAY,
    ),
    CommandEntry(
        "pause",
        "vmlab.cli.manager.living",
        "pause",
        "Stop machines' vCPUs.",
        _STAY,
    ),
    CommandEntry(
        "resume",
        "vmlab.cli.manager.living",
        "resume",
        "Let paused machines run on.",
        _STAY,
    ),
    CommandEntry(
        "resize",
        "vmlab.cli.manager.living",
        "resize",
        "Change a machine's vCPUs and memory.",
        _STAY,
    ),
    CommandEntry(
        "update",
        "vmlab.cli.manager.living",
        "update",
        "Change a machine's name, labels, policy or metadata.",
        _STAY,
    ),
    CommandEntry(
        "list",
        "vmlab.cli.manager.looking",
        "list_",
        "List machines.",
        _STAY,
    ),
    CommandEntry(
        "show",
        "vmlab.cli.manager.looking",
        "show",
        "Show a machine: disks, addresses, snapshots, what it uses.",
        _STAY,
    ),
    CommandEntry(
        "exec",
        "vmlab.cli.manager.inside",
        "execute",
        "Run a command in a machine's guest as if it ran here.",
        _STAY,
    ),
    CommandEntry(
        "snapshot",
        "vmlab.cli.manager.snapshots",
        "snapshot",
        "Save a machine's disks and memory; list or remove snapshots.",
        _STAY,
    ),
    CommandEntry(
        "restore",
        "vmlab.cli.manager.snapshots",
        "restore",
        "Bring a snapshot of a machine back.",
        _STAY,
    ),
    CommandEntry(
        "clone",
        "vmlab.cli.manager.snapshots",
        "clone",
        "Make a second machine of one.",
        _STAY,
    ),
    CommandEntry(
        "migrate",
        "vmlab.cli.manager.snapshots",
        "migrate",
        "Move a machine to another host.",
        _STAY,
    ),
    CommandEntry(
        "export",
        "vmlab.cli.manager.archives",
        "export",
        "Write a machine to one file.",
        _STAY,
    ),
    CommandEntry(
        "import",
        "vmlab.cli.manager.archives",
        "import_",
        "Make a machine of an exported file.",
        _STAY,
    ),
    CommandEntry(
        "disk",
        "vmlab.cli.manager.disks",
        "app",
        "Disks that outlive machines: make, attach, detach, grow, remove.",
        _STAY,
    ),
    CommandEntry(
        "network",
        "vmlab.cli.manager.networks",
        "app",
        "Networks that machines are on, and their addresses.",
        _STAY,
    ),
    CommandEntry(
        "template",
        "vmlab.cli.manager.templates",
        "app",
        "What machines are made of.",
        _STAY,
    ),
    CommandEntry(
        "operations",
        "vmlab.cli.manager.operations",
        "app",
        "Changes that were asked for: list, show, wait for, cancel them.",
        _STAY,
    ),
    CommandEntry(
        "events",
        "vmlab.cli.manager.happenings",
        "events",
        "Tell what has happened, and what happens.",
        _STAY,
    ),
    CommandEntry(
        "findings",
        "vmlab.cli.manager.findings",
        "app",
        "Where the store and the world differ, and what to do about it.",
        _STAY,
    ),
    CommandEntry(
        "host",
        "vmlab.cli.manager.hosts",
        "app",
        "Where machines run, and what of it is taken.",
        _STAY,
    ),
    CommandEntry(
        "emergency-stop",
        "vmlab.cli.manager.hosts",
        "emergency_stop",
        "Kill machines of a host, a label or all, at once.",
        _STAY,
    ),
    CommandEntry(
        "serve",
        "vmlab.cli.manager.serving",
        "serve",
        "Be the manager for other commands, programs, hosts and browsers.",
        _STAY,
    ),
    CommandEntry(
        "backup",
        "vmlab.cli.backup",
        "backup",
        "Save all that the manager knows in a file.",
        _STAY,
    ),
    CommandEntry(
        "restore-backup",
        "vmlab.cli.backup",
        "restore_backup",
        "Make the manager's store of a backup.",
        _STAY,
    ),
    CommandEntry(
        "token",
        "vmlab.cli.manager.tokens",
        "app",
        "Who may ask a manager over TCP.",
        _STAY,
    ),
    CommandEntry(
        "test",
        "vmlab.cli.test",
        "app",
        "Run tests with machines, in Python and in plan files, and report.",
        _PROVE,
    ),
    CommandEntry(
        "report",
        "vmlab.cli.report",
        "app",
        "Show a run's results, write them as HTML, JUnit or CTRF, compare two runs.",
        _PROVE,
    ),
    CommandEntry(
        "debug",
        "vmlab.cli.debug",
        "debug",
        "Open the machine of a failed test as it was: a shell, its console, or gdb.",
        _PROVE,
    ),
    CommandEntry(
        "baseline",
        "vmlab.cli.baseline",
        "app",
        "Keep what runs measured, and tell whether other runs are better or worse.",
        _PROVE,
    ),
    CommandEntry(
        "conformance",
        "vmlab.cli.conformance",
        "conformance",
        "Run the suite that every hypervisor must pass.",
        _PROVE,
    ),
    CommandEntry(
        "simulate",
        "vmlab.cli.simulate",
        "simulate",
        "Run a simulated hypervisor in a process of its own.",
        _PROVE,
    ),
    CommandEntry(
        "demo",
        "vmlab.cli.demo",
        "demo",
        "A few minutes in the life of a simulated data centre, with a report.",
        _PROVE,
    ),
)

# Set by the scripts of --install-completion; its name is typer's, made of the program's name.
_COMPLETION_VARIABLE = "_VMLAB_COMPLETE"

EPILOG = "Exit status: " + ", ".join(
    (
        f"{ExitCode.OK} done",
        f"{ExitCode.FAILED} failed",
        f"{ExitCode.USAGE} wrong usage",
        f"{ExitCode.CANNOT} cannot be done",
        f"{ExitCode.UNAVAILABLE} not available on this host",
        f"{ExitCode.INTERRUPTED} interrupted.",
    )
)


class CommandTable(TyperGroup):
    """A group of commands that imports a command when it is called, not to list it."""

    entries: Sequence[CommandEntry] = COMMANDS

    # click's Context, Command and HelpFormatter are private to typer: Any at its edge.

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all commands, in the table's order."""
        return [entry.name for entry in self.entries]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, imported now; None where the table has none."""
        for entry in self.entries:
            if entry.name == cmd_name:
                return load(entry)
        return None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """As typer's, with a suggestion that needs no command imported."""
        names = self.list_commands(ctx)
        if args[0] not in names:
            close = difflib.get_close_matches(args[0], names, n=3, cutoff=0.5)
            suggestion = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            ctx.fail(f"there is no command {args[0]!r}{suggestion}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands for ``--help``, from the table alone."""
        for panel in dict.fromkeys(entry.panel for entry in self.entries):
            with formatter.section(panel):
                formatter.write_dl(
                    [(entry.name, entry.help) for entry in self.entries if entry.panel == panel]
                )


def load(entry: CommandEntry) -> Any:
    """Import a command and make the click command of it."""
    target: typer.Typer | Callable[..., object] = getattr(
        importlib.import_module(entry.module), entry.attribute
    )
    if isinstance(target, typer.Typer):
        app = target
    else:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(entry.name)(target)
    command = typer.main.get_command(app)
    command.name = entry.name
    # Completion is installed for vmlab as a whole.
    command.params = [
        option
        for option in command.params
        if option.name not in {"install_completion", "show_completion"}
    ]
    return command


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"vmlab {__version__}")
        raise typer.Exit(ExitCode.OK)


def _forbid_color(wanted: bool) -> bool:
    if wanted:
        output.configure(color=False, verbose=0)
    return wanted


app = typer.Typer(
    cls=CommandTable,
    name="vmlab",
    add_completion=True,
    # Plain text: quick to print, the same in a terminal, a pipe and the docs.
    rich_markup_mode=None,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    verbose: Annotated[
        int,
        typer.Option(
            "--verbose",
            "-v",
            count=True,
            show_default=False,
            help="Say what is done; twice for every detail.",
        ),
    ] = 0,
    no_color: Annotated[
        bool,
        typer.Option(
            "--no-color",
            callback=_forbid_color,
            is_eager=True,
            help="No colours, whatever the terminal can do.",
        ),
    ] = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """A laboratory for virtual machines.

    Define a machine once, boot it on any hypervisor, break it on purpose, and read a report you
    can trust.
    """
    output.configure(color=not no_color, verbose=verbose)
    if context.invoked_subcommand is None:
        print(context.get_help(), file=sys.stderr)
        raise typer.Exit(ExitCode.USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``vmlab`` with `argv` (default: the process's own) and return its exit status.

    With ``VMLAB_DEBUG=1`` an error is preceded by its traceback.
    """
    try:
        status = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more at its end; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.BROKEN_PIPE
    except Exception as error:
        return _report(error)
    return status


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    if _COMPLETION_VARIABLE in os.environ:
        command.main(arguments, prog_name="vmlab")  # answers the shell and exits
    try:
        with command.make_context("vmlab", arguments) as context:
            result = command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except typer.Abort:
        return ExitCode.INTERRUPTED
    return result if isinstance(result, int) else ExitCode.OK


def _report(error: Exception) -> int:
    """Print what went wrong as its kind deserves; returns the exit status."""
    if isinstance(error, typer.TyperException):
        return _report_usage(error)
    # Imported here, since whoever raised one has paid for it already.
    from vmlab.machine.errors import VmlabError

    if not isinstance(error, VmlabError):
        traceback.print_exception(error)
        output.print_error(
            f"{type(error).__name__}: this is a mistake in vmlab, not in what you asked",
            hint="please report it with the traceback above and the command line",
        )
        return ExitCode.INTERNAL
    if os.environ.get("VMLAB_DEBUG", "") not in {"", "0"}:
        traceback.print_exception(error)
    output.print_error(str(error), hint=error.hint, notes=getattr(error, "__notes__", ()))
    return error.exit_code


def _report_usage(error: typer.TyperException) -> int:
    if error.message.startswith("Usage: "):
        print(error.message, file=sys.stderr)  # a group without a command: the help is the message
        return error.exit_code
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "vmlab"
    message = _as_sentence_part(error.format_message())
    # typer checks values with pydantic, whose complaint does not repeat the value.
    details = getattr(error.__cause__, "errors", None)
    if details is not None and repr(details()[0]["input"]) not in message:
        message = f"{message}; got {details()[0]['input']!r}"
    output.print_error(message, hint=f"`{where} --help` shows what it takes")
    return error.exit_code


def _as_sentence_part(message: str) -> str:
    """typer's messages begin with a capital and end with a full stop; ours do not."""
    message = message.removesuffix(".")
    return message[:1].lower() + message[1:]
