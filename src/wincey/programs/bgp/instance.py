"""One routing daemon: found again, started, changed without touching sessions that stay, and ended.

Ours live in `Room.run` and outlive us. Two of them on one host would delete each other's routes from the kernel, as each
knows its own by nothing but the program's number: beside one of the same kind none is started.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from wincey.kernel.program import run
from wincey.model.address import Address, format_address
from wincey.model.bgp import BgpPeer, BgpSpeaker
from wincey.programs.bgp import bird, frr
from wincey.programs.bgp.control import BirdControl, ControlError, VtyControl
from wincey.programs.bgp.files import Applied, Room, ids, replace_file
from wincey.programs.bgp.launch import (
    FRR_PLACES,
    LaunchError,
    appears,
    end,
    find_bird,
    find_frr,
    launch,
    lives_here,
    taken,
)
from wincey.programs.bgp.session import Session

HOST_BIRD = "/run/bird/bird.ctl"
HOST_ZEBRA = "/run/frr/zserv.api"


class Instance(Protocol):
    """Calls raise ControlError, LaunchError and OSError."""

    async def alive(self) -> bool:
        """Whether it runs whole."""

    async def current(self, applied: Applied) -> bool:
        """Whether its configuration is still what was applied."""

    async def start(self, wanted: Applied, *, again: bool) -> None:
        """Start what does not run. again: the kernel has routes of an earlier run, which stay until they are told anew."""

    async def configure(self, before: Applied | None, wanted: Applied) -> None:
        """Change the running one. before: what it has now, None when that is not known."""

    async def sessions(self, peers: Sequence[BgpPeer]) -> dict[Address, Session]:
        """The sessions with those neighbours that it knows."""

    async def stop(self, applied: Applied) -> None:
        """Take leave of the neighbours and end."""

    async def close(self) -> None:
        """Leave it to itself."""


class Bird:
    """BIRD 2, our own or the host's. ended: called when it ends."""

    def __init__(self, room: Room, speaker: BgpSpeaker, ended: Callable[[], None]) -> None:
        self._room, self._own, self._ended = room, speaker.instance == "own", ended
        self._include = Path(speaker.include)
        self._path = room.run / "bird.ctl" if self._own else Path(speaker.control)
        self._control: BirdControl | None = None

    async def alive(self) -> bool:
        return await self._connected() is not None

    async def current(self, applied: Applied) -> bool:
        try:
            return (self._room.path / "bird.conf" if self._own else self._include).read_text() == self._config(applied)
        except OSError:
            return False

    async def start(self, wanted: Applied, *, again: bool) -> None:
        if not self._own:
            raise LaunchError(
                f"the host's BIRD does not listen at {self._path}: start it, or name its socket in Backend.Control;"
                f" its configuration must include {self._include}"
            )
        program = find_bird()
        if program is None:
            raise LaunchError("bird is not installed (Debian package bird2)")
        if lives_here(HOST_BIRD):
            raise LaunchError(
                "this host runs a BIRD of its own, and two would delete each other's routes: set Backend.Instance to"
                ' "host", stop the other one, or set Backend.Daemon to "frr"'
            )
        _check_port(wanted.speaker)
        user = "bird" if ids("bird")[0] else "root"
        _check_passable(self._room, user)
        self._room.make(user)
        path = self._room.write("bird.conf", self._config(wanted), user)
        self._path.unlink(missing_ok=True)  # nobody listens there
        options = ["-u", user, "-g", user] if user != "root" else []
        files = ["-c", str(path), "-s", str(self._path), "-P", str(self._room.run / "bird.pid")]
        await launch(program, *files, *options, *(["-R"] if again else []))
        await appears(self._path, "bird", self._room.run / "bird.log")
        await self._connected()

    async def configure(self, before: Applied | None, wanted: Applied) -> None:
        control = await self._reach()
        if self._own:
            self._room.write("bird.conf", self._config(wanted), "bird")
        else:
            replace_file(self._include, self._config(wanted).encode(), 0o640, ids("bird")[1])
        await control.configure()

    async def sessions(self, peers: Sequence[BgpPeer]) -> dict[Address, Session]:
        _, lines = await (await self._reach()).ask("show protocols")
        return bird.sessions(lines, peers)

    async def stop(self, applied: Applied) -> None:
        if not self._own:
            # The host's configuration names the file, so that it has to stay.
            replace_file(
                self._include, b"# Nothing here: flanneld does not use this BIRD now.\n", 0o640, ids("bird")[1]
            )
            if control := await self._connected():
                await control.configure()
            return
        await self.close()
        await end(self._room.run / "bird.pid", str(self._path))
        await _flush(applied.speaker, "bird")

    async def close(self) -> None:
        control, self._control = self._control, None
        if control:
            await control.close()

    def _config(self, applied: Applied) -> str:
        return bird.config(applied.speaker, applied.peers, str(self._room.run / "bird.log"))

    async def _connected(self) -> BirdControl | None:
        if self._control is None or self._control.gone:
            await self.close()
            control = BirdControl()
            self._control = control if await control.connect(self._path, self._ended) else None
        return self._control

    async def _reach(self) -> BirdControl:
        control = await self._connected()
        if control is None:
            raise ControlError("BIRD does not run")
        return control


class Frr:
    """FRR's zebra and bgpd (and bfdd), our own. ended: called when one of them ends."""

    def __init__(self, room: Room, speaker: BgpSpeaker, ended: Callable[[], None]) -> None:
        self._room, self._ended = room, ended
        self._programs = ("zebra", *(["bfdd"] if speaker.bfd else []), "bgpd")
        self._controls: dict[str, VtyControl] = {}

    async def alive(self) -> bool:
        return all([await self._connected(program) for program in self._programs])

    async def current(self, applied: Applied) -> bool:
        try:
            return (self._room.path / "bgpd.conf").read_text() == self._config(applied)
        except OSError:
            return False

    async def start(self, wanted: Applied, *, again: bool) -> None:
        paths = {program: find_frr(program) for program in self._programs}
        if missing := [program for program, path in paths.items() if path is None]:
            raise LaunchError(f"FRR's {' and '.join(missing)} can't be found in {', '.join(FRR_PLACES)} (package frr)")
        # A bgpd that is alive when another is not may have been told something else.
        await self._leave("bgpd")
        await end(self._room.run / "bgpd.pid", str(self._room.run))
        dead = [program for program in self._programs if not await self._connected(program)]
        if "zebra" in dead and lives_here(HOST_ZEBRA):
            raise LaunchError(
                "this host runs an FRR of its own, and two would delete each other's routes: stop it, or set"
                ' Backend.Daemon to "bird"'
            )
        _check_port(wanted.speaker)
        _check_passable(self._room, "frr")
        self._room.make("frr")
        self._write(wanted)
        run = self._room.run
        for program in dead:
            socket, log = run / f"{program}.vty", run / f"{program}.log"
            socket.unlink(missing_ok=True)
            # Without -P each would listen at a TCP port for telnet.
            options = [
                "-d",
                "-P",
                "0",
                "--vty_socket",
                str(run),
                "-z",
                str(run / "zserv"),
                "-i",
                str(run / f"{program}.pid"),
            ]
            options += ["-f", str(self._room.path / f"{program}.conf")]
            if program == "zebra":
                options += ["-K", "60"] if again else []  # seconds until leftovers go
            elif program == "bgpd":
                options += ["-p", str(wanted.speaker.port)]
            else:
                options += ["--bfdctl", str(run / "bfdd.sock")]
            await launch(str(paths[program]), *options)
            await appears(socket, program, log)
            if program == "zebra":
                await appears(run / "zserv", program, log)
            await self._connected(program)

    async def configure(self, before: Applied | None, wanted: Applied) -> None:
        if before is None or before.speaker != wanted.speaker:
            # The neighbours keep the routes, and zebra keeps the kernel's, until a new bgpd has told its own.
            await self.start(wanted, again=True)
            return
        old = {peer.address: peer for peer in before.peers}
        new = {peer.address: peer for peer in wanted.peers}
        self._write(wanted)
        control = await self._reach("bgpd")
        await control.configure(frr.changes(wanted.speaker, old, new))

    async def sessions(self, peers: Sequence[BgpPeer]) -> dict[Address, Session]:
        return frr.sessions(await (await self._reach("bgpd")).ask("show bgp summary json"))

    async def stop(self, applied: Applied) -> None:
        if control := await self._connected("bgpd"):
            # Neighbours would keep the routes of one that just disappears.
            await control.configure([f"router bgp {applied.speaker.asn}", "bgp shutdown"])
        await self.close()
        for program in reversed(("zebra", "bfdd", "bgpd")):
            await end(self._room.run / f"{program}.pid", str(self._room.run))
        await _flush(applied.speaker, "bgp")

    async def close(self) -> None:
        for program in list(self._controls):
            await self._leave(program)

    def _config(self, applied: Applied) -> str:
        return frr.config(applied.speaker, applied.peers, str(self._room.run / "bgpd.log"))

    def _write(self, wanted: Applied) -> None:
        self._room.write("bgpd.conf", self._config(wanted), "frr")
        self._room.write("zebra.conf", frr.zebra_config(str(self._room.run / "zebra.log")), "frr")
        self._room.write("bfdd.conf", frr.bfdd_config(str(self._room.run / "bfdd.log")), "frr")

    async def _connected(self, program: str) -> VtyControl | None:
        control = self._controls.get(program)
        if control is None or control.gone:
            await self._leave(program)
            control = VtyControl(f"FRR's {program}")
            if not await control.connect(self._room.run / f"{program}.vty", self._ended):
                return None
            self._controls[program] = control
        return control

    async def _reach(self, program: str) -> VtyControl:
        control = await self._connected(program)
        if control is None:
            raise ControlError(f"FRR's {program} does not run")
        return control

    async def _leave(self, program: str) -> None:
        if control := self._controls.pop(program, None):
            await control.close()


def _check_port(speaker: BgpSpeaker) -> None:
    if address := taken([local for local in (speaker.local, speaker.local_v6) if local], speaker.port):
        raise LaunchError(
            f"another program listens at TCP port {speaker.port} of {format_address(address)}, perhaps a BGP daemon of this"
            " host: stop it, or give all hosts another Backend.Port, such as 1179"
            + (', or set Backend.Instance to "host" if it is BIRD' if speaker.daemon == "bird" else "")
        )


def _check_passable(room: Room, user: str) -> None:
    if user != "root" and (parent := room.impassable()):
        raise LaunchError(
            f"the routing daemon runs as user {user}, which may not pass through {parent}: give it mode 0755, or put"
            " --subnet-file elsewhere"
        )


async def _flush(speaker: BgpSpeaker, protocol: str) -> None:
    """Remove what a daemon that was killed has left in the kernel."""
    for rule in speaker.accepted:
        family = "-4" if rule.network.bits == 32 else "-6"
        await run("ip", family, "route", "flush", "table", "main", "root", str(rule.network), "proto", protocol)
