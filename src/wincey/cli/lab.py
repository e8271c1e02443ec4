"""`wincey lab`: make, look at, use and remove labs. See wincey.lab for what one is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import click

from wincey.cli import lab_output
from wincey.cli.lab_chaos import chaos
from wincey.cli.lab_options import make_spec, spec_options
from wincey.cli.lab_vm import again_in_vm, vm, vm_option
from wincey.lab.errors import LabError
from wincey.lab.lab import ROOT, Lab, lab_names
from wincey.lab.namespace import enter_argv
from wincey.lab.needs import check_root, extend_path
from wincey.lab.ping import Matrix
from wincey.lab.plan import STORE
from wincey.lab.process import tail
from wincey.lab.report import Report, silent
from wincey.lab.shield import interruptible
from wincey.lab.traffic import Throughput, measure
from wincey.model.errors import UsageError

_ALL_LINES = 1_000_000

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object, in the last line of output.")
name_option = click.option("--name", help="Which lab; may be left out while only one is up.")


@click.group()
@click.option(
    "--directory",
    type=click.Path(path_type=Path),
    default=ROOT,
    envvar="WINCEY_LAB_DIRECTORY",
    show_default=True,
    help="Where labs keep their state; a directory for each.",
)
@click.pass_context
def lab(ctx: click.Context, directory: Path) -> None:
    """Try networks out: many hosts on this one machine.

    Hosts are network namespaces, with a daemon and containers on each, and a store. Needs root.

    Hosts are called h1, h2 and so on, their containers h1c1, h1c2 and so on. All hosts are on one network (10.99.0.0/24,
    fd00:99::/64) and have no default route. The store's machine, called store, stands for the rest of the world.

    \b
    Examples:
      wincey lab run                                    three hosts: up, ping all pairs, measure, down
      wincey lab up --hosts 5 --backend host-gw --store etcd3
      wincey lab ping                                   who reaches whom
      wincey lab exec h1c1 -- ping -c3 10.5.9.2         a command in a container, or on a host
      wincey lab up --daemon h2=/opt/flannel/flanneld --store etcd3     flannel on h2, ours elsewhere
      wincey lab down
      wincey lab vm -- uname -r                         a command in a virtual machine with Debian's kernel
      wincey lab chaos etcd-leader-killed card-down     bad days on purpose, and what becomes of the packets
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    extend_path()
    ctx.obj = directory.absolute()


lab.add_command(vm)
lab.add_command(chaos)


@lab.command()
@spec_options
@json_option
@click.pass_obj
def up(root: Path, /, *, timeout: float, as_json: bool, **options: Any) -> None:
    """Make a lab and leave it up. When it does not come up whole, it is taken down again.

    \b
    Examples:
      wincey lab up
      wincey lab up --hosts 20 --store etcd3 --dual
      wincey lab up --config '{"Network": "10.1.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": true}}'
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    spec = make_spec(root, **options)
    with interruptible(), lab_output.progress() as report:
        made = Lab(spec, root=root, report=report)
        made.up(timeout=timeout)
    status = made.status()
    if as_json:
        lab_output.print_json(status)
    else:
        lab_output.print_status(status)


@lab.command()
@spec_options
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Pings for each pair.")
@click.option(
    "--wait", type=float, default=10, show_default=True, help="Seconds to try again pairs that do not answer at first."
)
@click.option(
    "--seconds", type=float, default=2, show_default=True, help="Length of the throughput sample; 0 for none."
)
@json_option
@vm_option
@click.pass_context
def run(
    ctx: click.Context,
    /,
    *,
    timeout: float,
    count: int,
    wait: float,
    seconds: float,
    as_json: bool,
    in_vm: bool,
    **options: Any,
) -> None:
    """Make a lab, ping all pairs, measure, remove it.

    Exits with 0 if every pair is reachable; else names the pairs and exits with 1.

    \b
    Examples:
      wincey lab run --hosts 3 --backend vxlan
      wincey lab run --backend host-gw --store etcd2 --dual --json
      wincey lab run --backend ipip --vm           on a kernel that has what this machine's lacks
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    begin, root = time.monotonic(), ctx.obj
    spec = make_spec(root, **options)
    if in_vm:
        _exit(ok=False, code=again_in_vm(ctx, spec.hosts))
    with interruptible(), lab_output.progress() as report:
        made = Lab(spec, root=root, report=report)
        made.up(timeout=timeout, tolerant=True)
        try:
            matrix = made.ping(count=count, patience=wait)
            sample = None
            try:
                sample = _sample(made, matrix, seconds, report)
            except LabError as error:
                made.failures["throughput"] = str(error)
        finally:
            made.down()
    if as_json:
        summary = {"name": spec.name, "hosts": spec.hosts, "containers": spec.containers, "store": spec.store}
        more = {"config": spec.config, "failures": made.failures, "throughput": _sample_json(sample)}
        lab_output.print_json(summary | more | matrix.summary() | {"seconds": round(time.monotonic() - begin, 2)})
    else:
        lab_output.print_failures(made.failures)
        lab_output.print_throughput(sample)
        lab_output.print_matrix(matrix)
    _exit(ok=not matrix.unreachable and not made.failures)


@lab.command()
@name_option
@click.option("--count", type=click.IntRange(1, 1000), default=1, show_default=True, help="Pings for each pair.")
@click.option(
    "--wait", type=float, default=0, show_default=True, help="Seconds to try again pairs that do not answer at first."
)
@json_option
@click.pass_obj
def ping(root: Path, /, *, name: str | None, count: int, wait: float, as_json: bool) -> None:
    """Ping every container from every other one.

    In every family of the network. Exits with 0 if every pair is reachable; else names the pairs and exits with 1. With --json, `pairs` and `reachable` are
    numbers (a pair counts once in each direction and family) and `unreachable` is a list.
    """
    check_root()
    with interruptible(), lab_output.progress() as report:
        matrix = _open(root, name, report).ping(count=count, patience=wait)
    if as_json:
        lab_output.print_json(matrix.summary())
    else:
        lab_output.print_matrix(matrix)
    _exit(ok=not matrix.unreachable)


@lab.command("exec", context_settings={"allow_interspersed_args": False})
@name_option
@json_option
@click.argument("node", metavar="HOST|CONTAINER")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@click.pass_obj
def exec_(root: Path, /, *, name: str | None, as_json: bool, node: str, command: tuple[str, ...]) -> None:
    """Run a command on a host or in a container.

    Also on `store` or `switch`. Exits as the command does.

    \b
    Examples:
      wincey lab exec h1 -- ip route
      wincey lab exec h1c1 -- ping -c3 10.5.9.2
    """  # noqa: D301  # a real backspace: click keeps the lines after it as they are
    check_root()
    argv = list(command[1:] if command[0] == "--" else command)
    if not argv:
        raise UsageError(f"what is to be run on {node}? As in: wincey lab exec {node} -- ip route")
    where = _open(root, name).node(node)
    if not as_json:
        os.execvpe("nsenter", enter_argv(where.netns, argv), {**os.environ, **where.environment})  # noqa: S606  # becomes the command: terminal, signals, exit code
    done = where.exec(argv, timeout=3600)
    result = {"node": node, "argv": argv, "exit_code": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
    lab_output.print_json(result)
    _exit(ok=done.returncode == 0, code=done.returncode)


@lab.command()
@name_option
@click.option("-n", "--lines", type=int, help="Only the last lines of each.")
@click.option("-f", "--follow", is_flag=True, help="Go on showing what is added, until Ctrl-C.")
@json_option
@click.argument("hosts", metavar="[HOST]...", nargs=-1)
@click.pass_obj
def logs(
    root: Path, /, *, name: str | None, lines: int | None, follow: bool, as_json: bool, hosts: tuple[str, ...]
) -> None:
    """Show the logs of the daemons.

    Of all hosts and the store, or of those named (`store` is the store's).
    """
    found = _open(root, name)
    paths = {host.name: host.log_path for host in found.hosts} | {STORE: found.store.log_path}
    chosen = {each: paths[each] if each in paths else found.host(each).log_path for each in hosts} or paths
    if follow:
        os.execvp("tail", ["tail", "-n", str(_ALL_LINES if lines is None else lines), "-F", *map(str, chosen.values())])  # noqa: S606  # tail is what follows files
    shown = {each: tail(path, _ALL_LINES if lines is None else lines) for each, path in chosen.items()}
    if as_json:
        lab_output.print_json({"name": found.spec.name, "logs": shown})
        return
    for each, text in shown.items():
        for line in text:
            click.echo(f"{each}: {line}")


@lab.command()
@name_option
@json_option
@click.pass_obj
def status(root: Path, /, *, name: str | None, as_json: bool) -> None:
    """Show hosts, addresses, subnets and daemons."""
    found = _open(root, name).status()
    if as_json:
        lab_output.print_json(found)
    else:
        lab_output.print_status(found)


@lab.command()
@name_option
@click.option("--all", "every", is_flag=True, help="All labs.")
@json_option
@click.pass_obj
def down(root: Path, /, *, name: str | None, every: bool, as_json: bool) -> None:
    """End a lab and remove every trace of it.

    Its daemons, its store, whatever runs in its namespaces, and its files.
    """
    check_root()
    if every and name:
        raise UsageError("use either --name or --all")
    names = lab_names(root) if every else [_choose(root, name)]
    with lab_output.progress() as report:
        for each in names:
            Lab.open(each, root=root, report=report).down()
    if as_json:
        lab_output.print_json({"down": names})
    elif every and not names:
        click.echo("no lab is up")


@lab.command("list")
@json_option
@click.pass_obj
def list_(root: Path, /, *, as_json: bool) -> None:
    """Name the labs that are up."""
    names = lab_names(root)
    if as_json:
        lab_output.print_json({"labs": names})
        return
    for name in names:
        spec = Lab.open(name, root=root).spec
        click.echo(f"{name}: {spec.hosts} hosts, store {spec.store}, {spec.config}")
    if not names:
        click.echo("no lab is up; make one with: wincey lab up")


def _choose(root: Path, name: str | None) -> str:
    names = lab_names(root)
    if name or len(names) == 1:
        return name or names[0]
    if names:
        raise UsageError(f"several labs are up ({', '.join(names)}): say which with --name")
    raise LabError("no lab is up: make one with wincey lab up")


def _open(root: Path, name: str | None, report: Report = silent) -> Lab:
    return Lab.open(_choose(root, name), root=root, report=report)


def _sample(made: Lab, matrix: Matrix, seconds: float, report: Report) -> Throughput | None:
    """Measure between the first two containers on different hosts that reach each other."""
    reached = {(each.source, each.target, each.family) for each in matrix.results if each.ok}
    family = made.spec.families[0]
    for source in made.containers:
        for target in made.containers:
            if source.host is not target.host and (source.name, target.name, family) in reached and seconds > 0:
                report(f"measuring from {source.name} to {target.name}")
                return measure(source, target, family, seconds=seconds)
    return None


def _sample_json(sample: Throughput | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    return {"from": sample.source, "to": sample.target, "bits_per_second": round(sample.bits_per_second)}


def _exit(*, ok: bool, code: int = 1) -> None:
    if not ok:
        raise SystemExit(code)
