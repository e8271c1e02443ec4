"""`wincey install-cni`: put the CNI plugin and a network config where container runtimes look for them.

Each file is made beside its target and renamed over it, so that a runtime sees the old one or the new one, whole; containerd
does not notice a config that is renamed into its directory from another one.

The plugin is a script of a few lines that runs this installation's package under `python -IS`: without `site` and without
PYTHON* variables Python starts in half the time, and no variable of a runtime can change what it does.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import wincey
from wincey.model.errors import BadConfig, WinceyError

_BIN_DIR = "/opt/cni/bin"
_CONF_DIR = "/etc/cni/net.d"
_LONGEST_SHEBANG = 127
_DELEGATES = ("bridge", "host-local")

DEFAULT_NAME = "10-flannel.conflist"
DEFAULT_CONFLIST = """\
{
  "cniVersion": "0.4.0",
  "name": "cbr0",
  "plugins": [
    {"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
"""
"""As flannel's own manifests install it."""


class CannotInstall(WinceyError):
    """A file can't be written where it should be."""


@click.command("install-cni")
@click.option("--bin-dir", default=_BIN_DIR, show_default=True, help="Where the runtime looks for plugins.")
@click.option("--conf-dir", default=_CONF_DIR, show_default=True, help="Where it looks for network configs.")
@click.option(
    "--conflist",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help=f"A network config (.conflist or .conf) to install under its own name. Without: {DEFAULT_NAME}, unless it is there"
    " already.",
)
def install_cni(bin_dir: str, conf_dir: str, conflist: Path | None) -> None:
    """Install the CNI plugin `flannel` and its network config.

    The plugin runs this installation of wincey, so keep that where it is. The standard plugins bridge and host-local must
    be beside it (Debian: containernetworking-plugins, in /usr/lib/cni).

    \b
    Example:
      wincey install-cni --conflist examples/cni/10-flannel.conflist
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    text = conflist.read_text() if conflist else DEFAULT_CONFLIST
    name = conflist.name if conflist else DEFAULT_NAME
    check_config(text, str(conflist or name))
    plugin = Path(bin_dir) / "flannel"
    install(plugin, plugin_script(), mode=0o755)
    click.echo(f"installed {plugin}")
    missing = [each for each in _DELEGATES if not (Path(bin_dir) / each).exists()]
    if missing:
        click.echo(
            f"wincey: {bin_dir} has no {' and no '.join(missing)}: copy or link them there, or have the runtime look in"
            " both directories",
            err=True,
        )
    target = Path(conf_dir) / name
    if not conflist and target.exists():
        click.echo(f"kept {target}")
        return
    install(target, text, mode=0o644)
    click.echo(f"installed {target}")


def plugin_script() -> str:
    """The plugin: this Python, this package, and nothing else on the path."""
    python = os.path.abspath(sys.executable)
    shebang = f"#!{python} -IS"
    if len(shebang) > _LONGEST_SHEBANG or any(character.isspace() for character in python):
        # The kernel cuts such a line: sh runs the second line, which Python takes for a string.
        shebang = f"#!/bin/sh\n'''exec' \"{python}\" -IS \"$0\" \"$@\"\n' '''"
    source = str(Path(wincey.__file__).parents[1])
    return (
        f"{shebang}\n"
        f"# The CNI plugin of wincey {wincey.__version__}; made by wincey install-cni.\n"
        "import sys\n"
        f"sys.path.insert(0, {source!r})\n"
        "from wincey.cni.main import main\n"
        "main()\n"
    )


def check_config(text: str, name: str) -> None:
    """Raise BadConfig unless the text is a network config, a list or a single one, that calls our plugin."""
    try:
        document: Any = json.loads(text)
    except ValueError as error:
        raise BadConfig(f"{name} is not JSON: {error}") from None
    plugins = document.get("plugins", [document]) if isinstance(document, dict) else None
    if not isinstance(plugins, list) or not isinstance(document.get("name"), str):
        raise BadConfig(f'{name} is no network config: it needs a "name", and "plugins" or a "type"')
    if not any(isinstance(plugin, dict) and plugin.get("type") == "flannel" for plugin in plugins):
        raise BadConfig(f'{name}: none of its plugins is of "type": "flannel"')
    if ("plugins" in document) != name.endswith(".conflist"):
        # Runtimes go by the suffix, and pass over a file that is not what it says.
        raise BadConfig(f"{name}: a list of plugins is named .conflist, a single one .conf")


def install(path: Path, text: str, *, mode: int) -> None:
    """Replace a file by a rename within its directory, which is made if need be; raises CannotInstall."""
    draft = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Hidden, and of no suffix that a runtime looks for.
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            os.fchmod(file.fileno(), mode)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        if draft:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
        raise CannotInstall(f"{path} can't be written: {error.strerror or error}; run this as root") from None
