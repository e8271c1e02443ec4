"""`wincey`, the operator's command line: a group of commands, each imported when it is called.

To add a command, name its module and object in COMMANDS. Errors of ours end as one line on stderr and the exit code of
their class; nothing of ours prints a traceback.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import click

from wincey import __version__
from wincey.lab.suggest import suggestion
from wincey.model.errors import WinceyError

COMMANDS = {
    "bench": "wincey.cli.bench:bench",
    "completion": "wincey.cli.completion:completion",
    "config": "wincey.cli.config:config",
    "install-cni": "wincey.cli.install_cni:install_cni",
    "doctor": "wincey.cli.doctor:doctor",
    "docker-plugin": "wincey.cli.docker:docker_plugin",
    "lab": "wincey.cli.lab:lab",
    "leases": "wincey.cli.leases:leases",
    "peers": "wincey.cli.look:peers",
    "routes": "wincey.cli.routes:routes",
    "status": "wincey.cli.look:status",
    "diff": "wincey.cli.look:diff",
    "explain": "wincey.cli.look:explain",
    "top": "wincey.cli.top:top",
    "web": "wincey.cli.web:web",
}
"""Name of a command: where its click command is."""

_INTERRUPTED = 130


class LazyGroup(click.Group):
    """A group that imports a command when it is needed, and suggests the right name for a wrong one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *COMMANDS])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        names = self.list_commands(ctx)
        if args and args[0] not in names and not args[0].startswith("-"):
            ctx.fail(f"no command {args[0]!r}: there are {', '.join(names)}{suggestion(args[0], names)}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="wincey")
def cli() -> None:
    """Container networks: containers on different hosts get addresses of one network and reach each other.

    The daemon is a program of its own, flanneld, with flannel's flags. Here is what is around it.

    \b
    Examples:
      wincey lab run --hosts 3 --backend vxlan     try it, on this machine alone
      wincey status                                how this host is; also peers and diff
      wincey leases list --store http://10.0.0.1:2379
      wincey config set --store http://10.0.0.1:2379 net.json
      wincey lab --help
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are


@cli.command()
def version() -> None:
    """Print the version."""
    click.echo(f"wincey {__version__}")


def main() -> None:
    """Run the command line; the console script `wincey`."""
    os.umask(os.umask(0o022) | 0o022)  # as flanneld: what we make nobody else may write
    try:
        code = cli.main(prog_name="wincey", standalone_mode=False)
        sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except WinceyError as error:
        click.echo(f"wincey: {error}", err=True)
        code = error.exit_code
    except BrokenPipeError:
        # The reader (head, less) has seen enough; without this Python complains when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (OSError, subprocess.SubprocessError) as error:
        click.echo(f"wincey: {error}", err=True)
        code = 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("wincey: interrupted", err=True)
        code = _INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
