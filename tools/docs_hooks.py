"""The parts of the documentation that the code itself writes: mkdocs hooks.

mkdocs calls `on_config` and `on_files` (https://www.mkdocs.org/user-guide/plugins/#events); each
reference page is a function below that returns Markdown made from what vmlab imports, so that a
page cannot say what the code does not do. A page that cannot be made fails the build.
"""

from __future__ import annotations

import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

_GENERATED_NOTE = "<!-- made by tools/docs_hooks.py from the code -->\n\n"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the decisions, one file each, to the explanation section."""
    decisions = sorted((ROOT / "docs/explanation/decisions").glob("*.md"))
    for section in config.nav or []:
        if isinstance(section, dict) and "Explanation" in section and decisions:
            pages = [f"explanation/decisions/{path.name}" for path in decisions]
            section["Explanation"].append({"Decisions": pages})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    from mkdocs.structure.files import File

    for path, make in PAGES.items():
        files.append(File.generated(config, path, content=_GENERATED_NOTE + make()))
    return files


# ------------------------------------------------------------------------------- command line


def command_line_page() -> str:
    """Help of every command, as the command prints it."""
    from vmlab.cli.main import COMMANDS, app

    parts = [
        "# The command line\n",
        "Each command as `--help` prints it. Global options stand before the command.\n",
        "Environment: `NO_COLOR` forbids colours, `VMLAB_DEBUG=1` shows an error's traceback.\n",
        _help_of(app, "vmlab", level=2, own=True),
    ]
    for entry in COMMANDS:
        from vmlab.cli.main import load

        parts.append(f"## vmlab {entry.name}\n\n{entry.help}\n")
        parts.append(_help_of(load(entry), f"vmlab {entry.name}", level=3))
    return "\n".join(parts)


def _help_of(command: Any, path: str, *, level: int, own: bool = False) -> str:
    """Help text of a typer app or a click command and, unless `own`, of its subcommands."""
    import typer.main

    if isinstance(command, typer.Typer):
        command = typer.main.get_command(command)
    with command.make_context(path, [], resilient_parsing=True, terminal_width=88) as context:
        parts = [f"```text\n{context.get_help()}\n```\n"]
        if not own and hasattr(command, "list_commands"):
            for name in command.list_commands(context):
                below = f"{path} {name}"
                parts.append(f"{'#' * level} {below}\n")
                parts.append(_help_of(command.get_command(context, name), below, level=level + 1))
    return "\n".join(parts)


def exit_codes_page() -> str:
    """The table of exit codes."""
    from vmlab.cli.exit_codes import ExitCode

    rows = (
        (f"`{code.value}`", code.name.lower().replace("_", " "), code.meaning) for code in ExitCode
    )
    return "# Exit codes\n\n" + _table(("status", "name", "meaning"), rows)


# ------------------------------------------------------------------------------------- errors


def errors_page() -> str:
    """The error tree with each error's meaning and the exit status it ends a command with."""
    from vmlab.machine.errors import VmlabError

    parts = [
        "# Errors\n",
        "One tree, in `vmlab.machine.errors`. Each has a `message` (what was tried, what came "
        "back) and a `hint` (what to do), and names the machine, the hypervisor and the operation "
        "where there is one. On the command line both are printed without a traceback, and the "
        "command ends with the status beside the error.\n",
        _table(("error", "meaning", "exit status"), _error_rows(VmlabError, 0)),
    ]
    return "\n".join(parts)


def _error_rows(kind: type[Any], depth: int) -> Iterator[tuple[str, str, str]]:
    indent = "&emsp;" * depth
    yield f"{indent}`{kind.__name__}`", _first_paragraph(kind), f"`{kind.exit_code}`"
    for below in sorted(kind.__subclasses__(), key=lambda each: each.__name__):
        if below.__module__ == kind.__module__:
            yield from _error_rows(below, depth + 1)


# ------------------------------------------------------------------------------------- states


def states_page() -> str:
    """The states as a diagram, and the tables behind it."""
    from vmlab.machine.states import OPERATIONS, TRANSITIONS, MachineState

    transitions = (
        (
            f"`{state}`",
            ", ".join(f"`{to}`" for to in MachineState if to in TRANSITIONS[state])
            or "nothing: it is gone",
        )
        for state in MachineState
    )
    operations = (
        (f"`{name}`", ", ".join(f"`{state}`" for state in MachineState if state in allowed))
        for name, allowed in OPERATIONS.items()
    )
    return "\n".join(
        (
            "# States\n",
            "Every hypervisor has these states and these transitions and no others; they are one "
            "table, `vmlab.machine.states.TRANSITIONS`, and this page is made from it.\n",
            f'<div style="overflow-x: auto">\n{state_diagram()}\n</div>\n',
            "Rounded: lasts until something happens. Square: lasts as long as one operation. An "
            "arrow with two heads goes both ways. A state that can follow any other is drawn with "
            "one dashed arrow, and its arrows back to states that last are left out (a hypervisor "
            "answers again, and the machine is found to be running); the table has them all.\n",
            "## Transitions\n",
            _table(("from", "to"), transitions),
            "## Where an operation may begin\n",
            "Anything else raises `InvalidState` with the states that would allow it and the "
            "actual one. `status` may be asked in any state.\n",
            _table(("operation", "states"), operations),
        )
    )


def state_diagram() -> str:
    """The transitions as inline SVG, drawn by graphviz.

    A state that every state but itself and the final one can go to is drawn with one arrow from
    "any state", and without its arrows to states that last, or the picture would be all arrows.
    """
    from vmlab.machine.states import STABLE, TRANSITIONS, MachineState

    final = {state for state in MachineState if not TRANSITIONS[state]}
    everywhere = {
        target
        for target in MachineState
        if all(
            target in TRANSITIONS[state] for state in MachineState if state not in {target, *final}
        )
    }
    lines = [
        "digraph states {",
        'graph [bgcolor=transparent, rankdir=TB, nodesep=0.3, ranksep=0.5, fontname="sans-serif"];',
        'node [shape=box, fontname="sans-serif", fontsize=13, height=0.4];',
        "edge [arrowsize=0.7];",
    ]
    for state in MachineState:
        style = "rounded" if state in STABLE else "solid"
        lines.append(f'"{state}" [style="{style}"{", peripheries=2" if state in final else ""}];')
    drawn = {
        (state, target)
        for state in MachineState
        for target in TRANSITIONS[state] - everywhere
        if state not in everywhere or target not in STABLE
    }
    for state, target in sorted(drawn):
        if (target, state) not in drawn:
            lines.append(f'"{state}" -> "{target}";')
        elif state < target:
            lines.append(f'"{state}" -> "{target}" [dir=both];')
    for target in MachineState:
        if target in everywhere:
            lines.append(f'"any of {target}" [label="any state", style=dashed];')
            lines.append(f'"any of {target}" -> "{target}" [style=dashed];')
    return _svg("\n".join([*lines, "}"]))


def _svg(graph: str) -> str:
    """`graph`, in graphviz's language, as an SVG element that takes the page's text colour."""
    dot = shutil.which("dot")
    if dot is None:
        raise RuntimeError("graphviz is not installed; Debian has it: apt-get install graphviz")
    drawn = subprocess.run([dot, "-Tsvg"], input=graph, capture_output=True, text=True, check=True)
    svg = re.sub(r"<!--.*?-->", "", drawn.stdout[drawn.stdout.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'width="\d+pt" height="\d+pt"', r'style="width: 100%; min-width: 640px"', svg)
    svg = svg.replace('"black"', '"currentColor"').replace("<text ", '<text fill="currentColor" ')
    # Markdown ends a block of HTML at an empty line.
    return "\n".join(line for line in svg.splitlines() if line.strip())


# ------------------------------------------------------------- capabilities, faults and events


def capabilities_page() -> str:
    """What a hypervisor can declare, and its limits."""
    from vmlab.machine.capabilities import DESCRIPTIONS, Capability, Limits

    return "\n".join(
        (
            "# Capabilities\n",
            "What a hypervisor declares, the conformance suite makes it prove; what it does not "
            "declare raises `UnsupportedOperation`. `vmlab hypervisors` lists what works on this "
            "host.\n",
            _table(
                ("capability", "what works then"),
                ((f"`{each.value}`", DESCRIPTIONS[each]) for each in Capability),
            ),
            "## Limits\n",
            "The most that a hypervisor allows; what is not there has no limit of its own.\n",
            _fields(Limits.model_json_schema()),
        )
    )


def faults_page() -> str:
    """Every kind of fault with its fields, and when it can strike."""
    from typing import get_args

    from vmlab.machine import faults

    parts = [
        "# Faults\n",
        "What can be broken, as data: the same fault goes to the simulator, to the engine's "
        "devices and to a real QEMU.\n",
        "## Where\n",
        _who_injects_what(),
        "## When\n",
        "The field `when` of every fault; without it the fault strikes at once.\n",
    ]
    for trigger in get_args(get_args(faults.Trigger)[0]):
        name = trigger.model_fields["on"].default
        parts.append(f'### on = "{name}"\n\n{_first_paragraph(trigger)}\n')
        parts.append(_fields(trigger.model_json_schema(), leave_out={"on"}))
    kinds = get_args(get_args(faults.Fault)[0])
    parts.append("## What\n\nAll have these fields; those of one kind stand with it.\n")
    shared = set.intersection(*(set(kind.model_fields) for kind in kinds))
    parts.append(_fields(kinds[0].model_json_schema(), only=shared - {"kind"}))
    for kind in kinds:
        parts.append(f"### {kind.model_fields['kind'].default.value}\n\n{_first_paragraph(kind)}\n")
        parts.append(_fields(kind.model_json_schema(), leave_out=shared))
    return "\n".join(parts)


def _who_injects_what() -> str:
    """Which hypervisor can inject which fault, as each declares it."""
    from vmlab.hypervisors.embedded import faults as embedded
    from vmlab.hypervisors.qemu import breakable
    from vmlab.hypervisors.qemu import hypervisor as qemu
    from vmlab.hypervisors.simulated.faults import ALL_KINDS
    from vmlab.machine.faults import FaultKind

    def cell(kind: FaultKind, able: Set[FaultKind], counted: Set[FaultKind]) -> str:
        words = ["yes" if kind not in breakable.KINDS or able is not qemu.FAULTS else "breakable"]
        return " ".join(words + ["(counted)"] * (kind in counted)) if kind in able else "no"

    rows = [
        (
            f"`{kind.value}`",
            cell(kind, ALL_KINDS, ALL_KINDS),
            cell(kind, embedded.FAULTS, embedded.COUNTED),
            cell(kind, qemu.FAULTS, qemu.COUNTED),
        )
        for kind in FaultKind
    ]
    told = (
        "Counted ones can strike at the nth occasion and by chance; the others at a time, and when "
        "a text is printed. On QEMU a disk has to be `breakable` for the faults that say so, and "
        "for occasions to be counted: a process of its own serves it then. There, and on the "
        "embedded engine, what says no is refused by its name.\n"
    )
    return _table(("fault", "simulated", "embedded", "qemu"), rows) + "\n" + told


def events_page() -> str:
    """The event types with the data that each carries, from the comments beside them."""
    from vmlab.machine import events

    rows = []
    for match in re.finditer(
        r'^    [A-Z_]+ = "([\w-]+)"(?:  # (.*))?$',
        inspect.getsource(events.EventType),
        re.MULTILINE,
    ):
        data = ", ".join(f"`{word}`" for word in (match[2] or "").split(", ") if word) or "nothing"
        rows.append((f"`{match[1]}`", data))
    if len(rows) != len(events.EventType):
        raise RuntimeError("an event type in vmlab.machine.events is not written as the others are")
    return "\n".join(
        (
            "# Events\n",
            _paragraphs(events.Event) + "\n",
            _fields(events.Event.model_json_schema()),
            "## Types\n",
            _table(("type", "data"), rows),
        )
    )


# -------------------------------------------------------------------------------- conformance


def conformance_page() -> str:
    """Every check of the suite: its id, the clause of the contract it proves, what it needs."""
    from vmlab.conformance.registry import Check, checks
    from vmlab.conformance.together import CLAUSE, TOGETHER

    def needs(check: Check) -> str:
        capabilities = [f"`{each.value}`" for each in check.needs]
        # In parentheses stands what is said when it is missing.
        means = [each.value.partition(" (")[0] for each in check.means]
        return ", ".join([*capabilities, *means]) or "nothing"

    topics: dict[str, list[tuple[str, str, str]]] = {}
    for check in checks().values():
        topics.setdefault(check.topic, []).append((f"`{check.id}`", check.clause, needs(check)))
    parts = [
        "# Conformance\n",
        "The contract, clause by clause, as `vmlab conformance` checks it. A check runs where the "
        "hypervisor declares what it needs; where it does not, it is skipped, with the reason in "
        "the report.\n",
    ]
    for topic, rows in sorted(topics.items()):
        parts.append(f"## {topic}\n\n{_table(('check', 'clause', 'needs'), sorted(rows))}")
    parts.append("## together\n")
    parts.append(
        _table(("check", "clause", "needs"), [(f"`{TOGETHER}`", CLAUSE, "several hypervisors")])
    )
    return "\n".join(parts)


# -------------------------------------------------------------------------------------- files


def files_page() -> str:
    """Fields of every file that vmlab reads or writes, with the whole JSON Schema."""
    parts = [
        "# Files\n",
        "What vmlab reads (TOML or JSON) and writes (JSON). `vmlab schema` prints the JSON "
        "Schemas, for editors and validators.\n",
    ]
    for name, schema in schemas().items():
        parts.append(f"## {name}\n\n{schema.get('description', '')}\n")
        parts.append(_fields(schema))
        if name == "faults":
            parts.append("The kinds of fault and their fields: [faults](faults.md).\n")
        for part, below in sorted(schema.get("$defs", {}).items()):
            if below.get("properties") and name != "faults":
                parts.append(f"### {name}: {part}\n\n{below.get('description', '')}\n")
                parts.append(_fields(below))
        text = json.dumps(schema, indent=2)
        parts.append(
            f'??? note "JSON Schema of {name}"\n' + _indented(f"```json\n{text}\n```") + "\n"
        )
    return "\n".join(parts)


def schemas() -> Mapping[str, dict[str, Any]]:
    """JSON Schemas of the documents, as `vmlab schema` prints them, by its names for them."""
    from vmlab.cli.schema import Document, schema_of

    return {document.value: schema_of(document) for document in Document}


# ------------------------------------------------------------------------------------- images


def images_page() -> str:
    """The recipes that come with vmlab, and everything that decides where images come from."""
    from vmlab.images import recipe as recipes
    from vmlab.images import settings
    from vmlab.images.debian import mirrors
    from vmlab.images.tiny import modules

    built_in = [recipes.builtin(name) for name in recipes.builtin_names()]
    variables = {field: f"`{variable}`" for variable, field in settings.VARIABLES.items()} | {
        "debian_mirror": f"`{mirrors.VARIABLE}`",
        "debian_security_mirror": f"`{mirrors.SECURITY_VARIABLE}`",
    }
    fields = settings.ImageSettings.model_fields
    parts = [
        "# Images\n",
        "How to use them: [build and import images](../how-to/build-an-image.md).\n",
        "## Recipes that come with vmlab\n",
        _table(
            ("name", "packages", "what it is"),
            (
                (f"`{recipe.name}`", ", ".join(recipe.packages), recipe.description)
                for recipe in built_in
            ),
        ),
        "The fields of a recipe: [files](files.md#recipe).\n",
        "## Modules that @lab stands for\n",
        _table(
            ("list", "modules"),
            (
                ("`load`", " ".join(modules.LAB_LOAD)),
                ("`late`", " ".join(modules.LAB_LATE)),
                ("`available`", " ".join(modules.LAB_AVAILABLE)),
            ),
        ),
        "## Settings\n",
        "In the table `[images]` of `config.toml` (`VMLAB_CONFIG` names another file). A variable "
        "of the environment comes before the file, except for the mirrors, where the file comes "
        "first.\n",
        _table(
            ("setting", "environment", "meaning"),
            (
                (f"`{name}`", variables.get(name, ""), field.description or "")
                for name, field in fields.items()
            ),
        ),
    ]
    return "\n".join(parts)


# ------------------------------------------------------------------------------------ manager


def manager_page() -> str:
    """Every variable of the environment that says how a manager works, and which one is asked."""
    from vmlab.manager.client.address import TOKEN_VARIABLE, URL_VARIABLE
    from vmlab.manager.service.__main__ import LINGER_VARIABLE
    from vmlab.manager.service.serving import LINGER
    from vmlab.manager.settings import VARIABLES, Limits, Settings

    fields = dict(Settings.model_fields)
    fields |= {f"limits.{name}": field for name, field in Limits.model_fields.items()}
    rows = [
        (
            f"`{variable}`",
            "what the host has" if name.startswith("limits.") else _default(fields[name].default),
            fields[name].description or "",
        )
        for variable, name in VARIABLES.items()
    ]
    linger = "seconds that a manager in the background stays after the last question"
    url = "manager that commands speak to: `http://...`, `https://...`, `unix:/PATH`"
    parts = [
        "# The manager's settings\n",
        "How to use it: [manage machines](../how-to/manage-machines.md), [serve the manager]"
        "(../how-to/serve-the-manager.md).\n",
        "## Of a manager\n",
        "Variables of the environment, which are read when it starts: by `vmlab serve`, or by the "
        "first command, which starts one in the background. `vmlab serve --stop` ends that one; "
        "the next command starts another. A value that cannot be is refused by its variable's "
        "name.\n",
        _table(
            ("variable", "if left out", "meaning"),
            [*rows, (f"`{LINGER_VARIABLE}`", f"{LINGER:g}", linger)],
        ),
        "## Of commands and clients\n",
        _table(
            ("variable", "if left out", "meaning"),
            [
                ("`VMLAB_HOME`", "the user's data directory", "where a manager keeps all it has"),
                (f"`{URL_VARIABLE}`", "the home's own manager", url),
                (f"`{TOKEN_VARIABLE}`", "none", "token that a manager at a URL is shown"),
            ],
        ),
    ]
    return "\n".join(parts)


def _default(value: object) -> str:
    """What a setting is if nobody says it; what is None or made anew says so in its meaning."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:g}" if isinstance(value, float) else ""


# ------------------------------------------------------------------------------------- pytest


def pytest_page() -> str:
    """The fixtures, the mark's arguments and the options, from the plugin itself."""
    from vmlab.pytest_plugin import marks, options, plugin

    fixtures = []
    for name, thing in vars(plugin).items():
        function = getattr(thing, "__wrapped__", None) or getattr(thing, "__pytest_wrapped__", None)
        marker = getattr(thing, "_fixture_function_marker", None)
        if marker is not None and function is not None:
            summary, *rest = (inspect.getdoc(thing) or "").split("\n\n")
            fixtures.append((f"`{name}`", str(marker.scope), " ".join([summary, *rest])))
    missing = marks.ARGUMENTS.keys() ^ marks.MEANINGS.keys()
    if missing or not fixtures:
        raise RuntimeError(f"the page of the pytest plugin lacks {missing or 'the fixtures'}")
    return "\n".join(
        (
            "# pytest\n",
            "The plugin is there wherever vmlab is installed; how to begin: "
            "[test your first guest](../tutorial/test-your-first-guest.md).\n",
            "## Fixtures\n",
            "A project's own fixture of one of these names comes first.\n",
            _table(("fixture", "lives as long as the", "what it is"), fixtures),
            "## The mark `vm`\n",
            "`@pytest.mark.vm(...)` on a test, a class, or a module (`pytestmark`); the nearest "
            "comes first. Relative paths are seen from the test's file.\n",
            _table(
                ("argument", "meaning"),
                ((f"`{name}`", meaning) for name, meaning in marks.MEANINGS.items()),
            ),
            "## Options\n",
            "Those with a setting may stand in the ini file under that name too.\n",
            _table(
                ("option", "setting", "meaning"),
                (
                    (
                        f"`{each.option}`",
                        f"`{each.key}`" if each.ini else "",
                        each.help + (f" One of {', '.join(each.choices)}." if each.choices else ""),
                    )
                    for each in options.SETTINGS
                ),
            ),
            "## Outcomes\n",
            "A test whose machine died is an *error*, with the evidence; a machine that fell ill "
            "(an oops, a lockup) and a test out of time are *failures*. Both end the test at "
            "once, whatever it is doing. The report has every collected test from before its "
            "first machine exists: what never ended is *pending*.\n",
        )
    )


# ---------------------------------------------------------------------------------- rendering


def _fields(
    schema: Mapping[str, Any], *, only: set[str] | None = None, leave_out: set[str] | None = None
) -> str:
    """A table of the properties of an object's JSON Schema."""
    required = set(schema.get("required", ()))
    rows = []
    for name, about in schema.get("properties", {}).items():
        if (only is not None and name not in only) or name in (leave_out or ()):
            continue
        if name in required:
            default = "required"
        elif "default" in about:
            default = f"`{json.dumps(about['default'])}`"
        else:
            default = ""
        rows.append((f"`{name}`", _type_of(about), default, about.get("description", "")))
    return _table(("field", "type", "default", "meaning"), rows) if rows else ""


def _type_of(about: Mapping[str, Any]) -> str:
    """A JSON Schema's type in a few words."""
    if "$ref" in about:
        return str(about["$ref"]).rsplit("/", 1)[-1]
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    for union in ("anyOf", "oneOf"):
        if union in about:
            return " or ".join(dict.fromkeys(_type_of(each) for each in about[union]))
    kind = str(about.get("type", "anything"))
    if kind == "array":
        return f"list of {_type_of(about['items'])}" if about.get("items") else "list"
    if kind == "object" and isinstance(about.get("additionalProperties"), dict):
        return f"table of {_type_of(about['additionalProperties'])}"
    bounds = [
        f"{sign} {about[key]}"
        for key, sign in (
            ("minimum", "≥"),
            ("exclusiveMinimum", ">"),
            ("maximum", "≤"),
        )
        if key in about
    ]
    return f"{kind} {', '.join(bounds)}".strip()


def _table(titles: tuple[str, ...], rows: Any) -> str:
    """A Markdown table; a "|" in a cell is part of the cell."""
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    lines += [
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _paragraphs(thing: object) -> str:
    return inspect.getdoc(thing) or ""


def _first_paragraph(thing: object) -> str:
    return " ".join(_paragraphs(thing).split("\n\n")[0].split())


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.splitlines())


PAGES: Mapping[str, Callable[[], str]] = {
    "reference/command-line.md": command_line_page,
    "reference/exit-codes.md": exit_codes_page,
    "reference/errors.md": errors_page,
    "reference/states.md": states_page,
    "reference/capabilities.md": capabilities_page,
    "reference/faults.md": faults_page,
    "reference/events.md": events_page,
    "reference/conformance.md": conformance_page,
    "reference/files.md": files_page,
    "reference/images.md": images_page,
    "reference/manager.md": manager_page,
    "reference/pytest.md": pytest_page,
}
