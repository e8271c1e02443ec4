"""`wincey lab vm` and the option `--vm`: a command, or the lab itself, on another kernel. See wincey.lab.vm."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click.core import ParameterSource

from wincey.lab.report import Report
from wincey.lab.shield import interruptible
from wincey.lab.vm import MEMORY, TIMEOUT, run_in_vm
from wincey.lab.vm_kernel import cache_directory

_HOST_MEMORY = 48  # MiB that a host's daemon and containers take
_HOST_TIME = 20.0  # seconds that a host may take more

vm_option = click.option(
    "--vm",
    "in_vm",
    is_flag=True,
    help="Make the lab in a virtual machine with Debian's kernel: slower, and needs qemu-system-x86, but no root.",
)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--memory", type=click.IntRange(256), default=MEMORY, show_default=True, help="MiB of the machine.")
@click.option("--timeout", type=float, default=TIMEOUT, show_default=True, help="Seconds for all, the boot included.")
@click.option(
    "--cache",
    type=click.Path(path_type=Path, file_okay=False),
    default=cache_directory,
    show_default="~/.cache/wincey/vm",
    envvar="WINCEY_VM_DIRECTORY",
    help="Where the kernel is kept.",
)
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def vm(*, memory: int, timeout: float, cache: Path, command: tuple[str, ...]) -> None:
    """Run a command in a virtual machine.

    For what this machine's kernel lacks: the machine has Debian's stock kernel, emulated in software. It sees this machine's
    files and runs its programs, as root, in the present directory; what the command changes is gone afterwards, and /run
    starts empty. It has no network. Exits as the command does.

    The first time the kernel is fetched with apt-get (70 MB), without being installed.

    \b
    Examples:
      wincey lab vm -- uname -r
      wincey lab vm -- sh -c 'modprobe ipip && ip -d link show tunl0'
      wincey lab vm -- wincey lab run --backend wireguard
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    with interruptible():
        code = run_in_vm(command, _show, memory=memory, timeout=timeout, cache=cache.absolute(), report=_report())
    raise SystemExit(code)


def again_in_vm(ctx: click.Context, hosts: int) -> int:
    """Run the present command of `wincey lab` in a virtual machine, as it was given but for --vm; returns its exit code."""
    words = [f"{name}={value}" if value else name for name, value in _given(ctx)]
    # Everything is slower there. Who gives a number means it.
    patience = [
        f"{name}={value}"
        for name, value in (("--timeout", 180), ("--wait", 60))
        if ctx.get_parameter_source(name.strip("-")) is not ParameterSource.COMMANDLINE
    ]
    argv = [sys.executable, "-m", "wincey.cli.wincey", "lab", str(ctx.info_name), *words, *patience]
    with interruptible():
        return run_in_vm(
            argv, _show, memory=MEMORY + hosts * _HOST_MEMORY, timeout=TIMEOUT + hosts * _HOST_TIME, report=_report()
        )


def _given(ctx: click.Context) -> list[tuple[str, str]]:
    """The options of the command line, each with its value ("" for a flag)."""
    found: list[tuple[str, str]] = []
    for option in ctx.command.params:
        if option.name and ctx.get_parameter_source(option.name) is ParameterSource.COMMANDLINE:
            value = ctx.params[option.name]
            if isinstance(option, click.Option) and option.is_flag:
                found.append((option.opts[0], ""))
            else:
                found += [(option.opts[0], str(each)) for each in (value if option.multiple else [value])]
    return [pair for pair in found if pair[0] != "--vm"]


def _show(piece: bytes, err: bool) -> None:
    stream = sys.stderr if err else sys.stdout
    stream.buffer.write(piece)
    stream.flush()


def _report() -> Report:
    return lambda what, done=0, total=0: click.echo(what, err=True)
