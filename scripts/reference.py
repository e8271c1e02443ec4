"""Write docs/reference/ from the code: the local API, the errors, the commands of `wincey`. A test says when it was forgotten.

Each page has one function that makes it from what the programs themselves use: the OpenAPI description, the classes of
errors, click's commands. scripts/man.py makes the manual pages from the same commands.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

import wincey
from wincey.cli.wincey import cli
from wincey.model.errors import WinceyError
from wincey.observe.localapi import openapi

DIRECTORY = Path(__file__).parents[1] / "docs" / "reference"
_SCHEMAS = "#/components/schemas/"


def _table(head: str, rows: list[list[str]]) -> str:
    columns = head.split("|")
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(each.replace('|', chr(92) + '|') for each in row)} |" for row in rows)])


def _paragraphs(text: str) -> str:
    """A docstring as Markdown: indentation and line ends are the source's."""
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n", text)]
    return "\n\n".join(block for block in blocks if block)


# --- the local API ----------------------------------------------------------------------------------------------------


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return _link(schema["$ref"].removeprefix(_SCHEMAS))
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_type(schema['items'])}" if "items" in schema else "list"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object, each value {_type(schema['additionalProperties'])}"
    return str(kind or "anything")


def api() -> str:
    """The page of the local API."""
    document = openapi()
    parts = [
        "# The local API",
        "<!-- Written by scripts/reference.py from src/wincey/observe/localapi.py and src/wincey/model/report.py. -->",
        f"Version `{document['info']['version'].split()[0]}`. JSON over HTTP on a Unix socket;"
        " [See what is going on](../looking.md#the-api) says where it is and who may use it. `GET /v1/openapi.json` is the same"
        " for programs. Durations are in seconds; `ago` and `left` count from now. Fields may be added within a version, none"
        " are removed.",
        "## Requests",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = operation["responses"]["200"]["content"]["application/json"]["schema"]
            parts += [f"### {method.upper()} {path}", f"{operation['summary']}. Answer: {_type(answer)}."]
            if operation["parameters"]:
                rows = [
                    [f"`{each['name']}`", each["description"], "yes" if each["required"] else "no"]
                    for each in operation["parameters"]
                ]
                parts.append(_table("Parameter|Meaning|Needed", rows))
    parts.append(
        f"Any other status than 200 has {_link('ErrorReport')} for a body: 400, 404, 405 or 503.\n\n## Answers"
    )
    for name, schema in document["components"]["schemas"].items():
        parts += [f"### {name}", _paragraphs(schema.get("description", ""))]
        needed = schema.get("required", [])
        rows = [
            [f"`{field}`", _type(of), "" if field in needed else "not always"]
            for field, of in schema.get("properties", {}).items()
        ]
        parts.append(_table("Field|Type|There", rows) if rows else "")
    return "\n\n".join(part for part in parts if part) + "\n"


# --- the errors -------------------------------------------------------------------------------------------------------


def error_classes() -> list[type[WinceyError]]:
    """All classes of errors that the package has, by module and then in the order of their source."""
    for module in pkgutil.walk_packages(wincey.__path__, "wincey."):
        spec = importlib.util.find_spec(module.name)
        if not module.name.endswith("__main__") and spec and str(spec.origin).endswith(".py"):  # not the compiled core
            importlib.import_module(module.name)

    def below(kind: type[WinceyError]) -> Iterator[type[WinceyError]]:
        for each in kind.__subclasses__():
            yield each
            yield from below(each)

    ours = {each for each in below(WinceyError) if each.__module__.startswith("wincey.")}
    return sorted(ours, key=lambda each: (each.__module__, each.__qualname__))


def errors() -> str:
    """The page of errors."""
    core = [each for each in error_classes() if each.__module__ == "wincey.model.errors"]
    rest = [each for each in error_classes() if each not in core and not each.__name__.startswith("_")]

    def rows(kinds: list[type[WinceyError]]) -> list[list[str]]:
        return [
            [
                f"`{each.__name__}`",
                _paragraphs(each.__doc__ or "").replace("\n\n", " "),
                f"`{each.__mro__[1].__name__}`",
                str(each.exit_code),
            ]
            for each in kinds
        ]

    parts = [
        "# Errors",
        "<!-- Written by scripts/reference.py from the classes of errors in src/wincey. -->",
        "Each message is one line: what failed, where, why, and what to do. A program of ours that ends by one prints it on"
        " standard error and ends with its exit code; flanneld logs it. Most of these end nothing: a daemon that has joined"
        " goes on with what it knows, and tries again.",
        _table("Exit code|", [["0", "fine"], ["1", "something is wrong, or failed"], ["2", "a wrong command line"]]),
        "In Python they are classes below `wincey.model.errors.WinceyError`.",
        "## Common",
        _table("Error|Meaning|Kind of|Exit code", rows(core)),
        "## Of one part",
    ]
    for module in sorted({each.__module__ for each in rest}):
        parts += [
            f"### {module}",
            _table("Error|Meaning|Kind of|Exit code", rows([each for each in rest if each.__module__ == module])),
        ]
    return "\n\n".join(parts) + "\n"


# --- the commands -----------------------------------------------------------------------------------------------------


def commands(command: click.Command = cli, parent: click.Context | None = None) -> Iterator[click.Context]:
    """A context for `wincey` and for each command below it, in the order of their names."""
    here = click.Context(command, info_name=(parent and command.name) or "wincey", parent=parent)
    yield here
    if isinstance(command, click.Group):
        for name in command.list_commands(here):
            found = command.get_command(here, name)
            assert found is not None
            if not found.hidden:
                yield from (
                    _named(context, name) if context.command is found else context for context in commands(found, here)
                )


def _named(context: click.Context, name: str) -> click.Context:
    context.info_name = name
    return context


def usage(context: click.Context) -> str:
    """`wincey peers [OPTIONS]`."""
    return " ".join([context.command_path, *context.command.collect_usage_pieces(context)])


def options(context: click.Context) -> list[tuple[str, str]]:
    """Each option as it is written, and what it means."""
    found = [each for each in context.command.get_params(context) if isinstance(each, click.Option)]
    records = [option.get_help_record(context) for option in found]
    return [(record[0], " ".join(record[1].split())) for record in records if record]


def blocks(context: click.Context) -> list[tuple[bool, str]]:
    """The help text: paragraphs, and (True) those whose lines stay as they are."""
    text = (context.command.help or "").split("\f")[0].strip("\n")
    found = []
    for block in re.split(r"\n\s*\n", text):
        kept = block.lstrip().startswith("\b")
        lines = [line for line in block.replace("\b", "").splitlines() if line.strip()]
        if lines:
            found.append((kept, "\n".join(lines) if kept else " ".join(" ".join(lines).split())))
    return found


def wincey_page() -> str:
    """The page of commands."""
    parts = [
        "# The commands of wincey",
        "<!-- Written by scripts/reference.py from src/wincey/cli. -->",
        "`-h` or `--help` after any of them prints the same. The daemon is a program of its own:"
        " [flanneld's flags](../flags.md).",
    ]
    for context in commands():
        parts += [f"## {context.command_path}", f"```\n{usage(context)}\n```"]
        for kept, text in blocks(context):
            if kept and text.lstrip().startswith("Examples:"):
                parts += ["Examples:", "```sh\n" + "\n".join(line.strip() for line in text.splitlines()[1:]) + "\n```"]
            else:
                parts.append(f"```\n{text}\n```" if kept else text.replace("<", "&lt;"))
        rows = [[f"`{name}`", text.replace("<", "&lt;")] for name, text in options(context) if "--help" not in name]
        if rows:
            parts.append(_table("Option|Meaning", rows))
        if isinstance(context.command, click.Group):
            below = [
                (name, context.command.get_command(context, name)) for name in context.command.list_commands(context)
            ]
            parts.append(
                _table(
                    "Command|",
                    [
                        [
                            f"[{name}](#{f'{context.command_path} {name}'.replace(' ', '-')})",
                            each.get_short_help_str(200),
                        ]
                        for name, each in below
                        if each and not each.hidden
                    ],
                )
            )
    return "\n\n".join(parts) + "\n"


PAGES = {"api.md": api, "errors.md": errors, "wincey.md": wincey_page}
"""Each page and what makes it."""

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DIRECTORY / name).write_text(make())
