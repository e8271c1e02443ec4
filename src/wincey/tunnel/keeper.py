"""The keeper: the process that holds a tunnel. One epoll loop over the device, the socket and the control connections.

It starts detached from any daemon, and no daemon's end touches it. An engine moves packets (see engines) until someone has
something to say on the control socket, and engines change in place: device, socket, peers and counters stay.

Requests of control.py, and what this keeper adds to them: `show` tells `wanted` and `engine` (engines.ENGINES), `core` (the
compiled one, or Python's), `why` it is no better one, `check` and `network` of sources; `configure` takes `engine`, and `check`
with `network`, if they are given. Both have `lasts` (see device.set_lasting), and `farewell`: the command to run at an end that
nobody told us to make. `handover` says `header` when its sender can take a device whose packets have the virtio
header. A keeper of an earlier release can't, and hands over a device without: it is opened anew, see device.reopen_tun.

It ends when told to (`stop`), when another keeper has taken over (`taken`), on SIGTERM, when no daemon is there and flannel
wants its place (see successor), or when its device is deleted: then there is nothing left to keep, and the end of its
connections tells the daemon at once.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from wincey.tunnel.control import BUILD, DirectoryAddress, Header, connect, decode, encode
from wincey.tunnel.device import Interface, has_header, is_lasting, open_tun, open_udp, reopen_tun, set_lasting
from wincey.tunnel.engines import ENGINES, OFFLOAD, PLAIN, engage
from wincey.tunnel.relay import Relay
from wincey.tunnel.sources import SourceCheck
from wincey.tunnel.successor import Successor

_TIMEOUT = 5.0  # seconds a keeper waits for the one it takes over from
_READ = 1 << 16  # bytes read from a control connection at once
_GONE = (errno.EBADFD, errno.EBADF)  # the kernel's words for a deleted device


class Keeper:
    """A tunnel in this process: made anew or taken over. `run` forwards until the end."""

    def __init__(self, control: str, tun: int, udp: socket.socket) -> None:
        self._control = control
        self._interface = Interface(tun)
        self._relay: Relay = Relay(tun, udp, self._interface.refuse, header=has_header(tun))
        self._wanted, self._why = PLAIN, ""
        self._farewell: list[str] = []
        self._predecessor = -1  # readable when the keeper that we took over from has ended
        self._clients: dict[int, _Client] = {}
        self._running = True
        self._owns_path = False
        self._listener = self._listen()

    @classmethod
    def create(cls, control: str, device: str, mtu: int, local: str, port: int, *, engine: str = OFFLOAD) -> Keeper:
        """Make device and socket; raises OSError, EBUSY when another process holds the device, ValueError for the engine."""
        tun = open_tun(device)
        keeper = cls(control, tun, open_udp(local, port))
        keeper._interface.mtu = mtu
        keeper._engage(engine)
        keeper.publish()
        return keeper

    @classmethod
    def take_over(cls, control: str) -> Keeper:
        """Go on in the place of the keeper behind `control`, which ends; raises OSError or ValueError if it did not.

        Device and socket are the same open files, so what is queued in them stays. The other one forwards until this one
        is complete, and again if this one fails: no packet is lost.
        """
        sock = connect(control, blocking=True)
        try:
            sock.settimeout(_TIMEOUT)
            sock.sendall(encode({"do": "handover", "header": True}))
            data, descriptors, _, _ = socket.recv_fds(sock, _READ, 2)
            buffer = bytearray(data)
            _reply(sock, buffer)
            if len(descriptors) != 2:
                raise OSError(errno.EPROTO, "the running keeper handed over no descriptors")
            state, peers = _ask(sock, {"do": "show", "peers": True}, buffer)
            tun, udp = descriptors
            keeper = cls(control, tun, socket.socket(fileno=udp))
            keeper._relay.update(peers)
            if "check" in state:
                keeper._relay.restrict(_check(state))
            keeper._farewell = _words(state.get("farewell", []))
            keeper._engage(str(state.get("wanted", OFFLOAD)))
            keeper._predecessor = _end_of(state.get("pid"), sock)
            last, _ = _ask(sock, {"do": "taken"}, buffer)
            counters = last.get("counters", state["counters"])  # an earlier release does not say how it ends
            if isinstance(counters, dict):
                keeper._relay.restore(counters)
        finally:
            sock.close()
        keeper.publish()
        return keeper

    def publish(self) -> None:
        """Put our control socket in its place, over one that is there."""
        os.rename(self._control + ".new", self._control)
        self._owns_path = True

    def run(self) -> None:
        """Forward and serve until the end; raises OSError only for what is no ordinary end."""
        signal.signal(signal.SIGTERM, self._terminate)
        try:
            self._loop()
        except OSError as error:
            if error.errno not in _GONE:
                raise
        finally:
            if self._owns_path:
                self._say_farewell()
            self._remove_path()

    def _say_farewell(self) -> None:
        """An end that nobody told us to make: the device goes with us after all, and with it what works on it."""
        with suppress(OSError):
            set_lasting(self._relay.tun, on=False)
            if self._farewell:
                os.waitpid(os.posix_spawn(self._farewell[0], self._farewell, os.environ), 0)

    def _loop(self) -> None:
        poll = self._poll = select.epoll()
        successor = Successor()
        listener, rivals = self._listener.fileno(), successor.socket.fileno()
        signals, wakeup = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        signal.set_wakeup_fd(wakeup.fileno())  # an engine that is not Python's own loop comes back for it
        for descriptor in (listener, rivals, signals.fileno(), self._predecessor):
            if descriptor >= 0:
                poll.register(descriptor, select.EPOLLIN)
        while self._running:
            self._forward()
            for descriptor, events in poll.poll(0):
                if not self._running:
                    return
                if descriptor in self._clients:
                    self._serve(self._clients[descriptor], events)
                elif descriptor == listener:
                    self._accept()
                elif descriptor == rivals:
                    name = self._interface.name  # "" when the device was moved to another namespace
                    wanted = successor.came_and_went(name, self._interface.address() if name else b"-")
                    if wanted and not self._clients:
                        return
                elif descriptor == self._predecessor:
                    self._succeed()
                elif descriptor == signals.fileno():
                    signals.recv(_READ)

    def _forward(self) -> None:
        """Move packets until there is something on a control connection; an engine that fails is replaced by the plain one."""
        try:
            self._relay.forward(self._poll.fileno())
        except OSError as error:
            if error.errno in _GONE or self._relay.name == PLAIN:
                raise
            wanted, reason = self._wanted, f"{self._relay.name} failed: {error.strerror or error}"
            self._engage(PLAIN)
            self._wanted, self._why = wanted, reason

    def _succeed(self) -> None:
        """The keeper that we took over from has ended, so a device of an earlier release can be opened anew."""
        self._poll.unregister(self._predecessor)
        os.close(self._predecessor)
        self._predecessor = -1
        wanted = self._wanted
        if wanted != PLAIN and not self._relay.header:
            self._reopen(header=True)
            self._engage(wanted)

    def _engage(self, wanted: str) -> None:
        """Have that engine, or the next best, move packets from here on; raises ValueError when there is none of that name."""
        if wanted not in ENGINES:
            raise ValueError(f"an engine is one of {', '.join(ENGINES)}, not {wanted!r}")
        old = self._relay
        new, self._why = engage(wanted, old.tun, old.udp, self._interface.refuse, header=old.header)
        self._wanted = wanted
        new.follow(old)
        old.close()
        self._relay = new

    def _reopen(self, *, header: bool) -> None:
        """Have the device with or without the virtio header, and the plain engine on it."""
        self._engage(PLAIN)
        relay = self._relay
        relay.outbound()  # what is queued in it, as far as a batch goes
        lasts = header and is_lasting(relay.tun)  # an earlier release does not know of it, and could not end it
        relay.tun = reopen_tun(relay.tun, header=header)
        relay.header = header
        self._interface.tun = relay.tun
        if lasts:
            set_lasting(relay.tun, on=True)

    def _terminate(self, *_: object) -> None:
        raise SystemExit(0)

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        path = self._control + ".new"
        if os.path.lexists(path):  # of a keeper that did not live to publish it; who holds the device is alone here
            os.unlink(path)
        mask = os.umask(0o177)
        try:
            with DirectoryAddress(path) as address:
                listener.bind(address)
        finally:
            os.umask(mask)
        listener.listen()
        self._identity = os.stat(path).st_ino
        return listener

    def _remove_path(self) -> None:
        try:
            if self._owns_path and os.stat(self._control).st_ino == self._identity:
                os.unlink(self._control)
        except FileNotFoundError:
            pass
        self._owns_path = False

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # gone again, or no descriptors left: whoever calls will call again
        sock.setblocking(False)
        self._clients[sock.fileno()] = _Client(sock)
        self._poll.register(sock.fileno(), select.EPOLLIN)

    def _serve(self, client: _Client, events: int) -> None:
        try:
            if events & ~select.EPOLLOUT:
                data = client.sock.recv(_READ)
                if not data:
                    raise ConnectionError
                client.unread += data
                while frame := decode(client.unread):
                    self._handle(client, *frame)
            client.flush()
            self._poll.modify(client.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if client.unsent else 0))
        except BlockingIOError:
            pass
        except (ConnectionError, ValueError):  # it left, or speaks something else
            del self._clients[client.sock.fileno()]
            client.sock.close()

    def _handle(self, client: _Client, header: Header, body: bytes) -> None:
        requests: dict[object, Callable[[_Client, Header, bytes], bytes]] = {
            "show": self._show,
            "configure": self._configure,
            "peers": self._peers,
            "handover": self._handover,
            "taken": self._taken,
            "stop": self._stop,
        }
        try:
            request = requests.get(header.get("do"))
            if request is None:
                raise ValueError(f"this keeper ({BUILD}) knows no request {header.get('do')!r}")
            client.unsent += request(client, header, body)
        except ConnectionError:
            raise
        except Exception as error:  # whatever is wrong with a request, packets go on
            text = error.strerror if isinstance(error, OSError) and error.strerror else f"{error}"
            client.unsent += encode({"error": text or type(error).__name__})

    def _show(self, _: _Client, header: Header, __: bytes) -> bytes:
        local, port = self._relay.udp.getsockname()
        name = self._interface.name
        state: Header = {
            "build": BUILD,
            "pid": os.getpid(),
            "device": name,
            "mtu": self._interface.mtu if name else 0,
            "local": local,
            "port": port,
            "counters": self._relay.counters,
            "lasts": bool(name) and is_lasting(self._relay.tun),
            "farewell": self._farewell,
            "wanted": self._wanted,
            "engine": self._relay.name,
            "core": self._relay.core,
            "why": self._why,
            "check": self._relay.check.mode,
            "network": f"{socket.inet_ntoa(self._relay.check.network)}/{self._relay.check.length}",
        }
        return encode(state, self._relay.table.records() if header.get("peers") else b"")

    def _configure(self, _: _Client, header: Header, __: bytes) -> bytes:
        mtu, local, port = header["mtu"], header["local"], header["port"]
        if not (isinstance(mtu, int) and isinstance(local, str) and isinstance(port, int)):
            raise ValueError("configure needs mtu, local and port")
        check = _check(header) if "check" in header else self._relay.check
        if (local, port) != self._relay.udp.getsockname():
            old, new = self._relay.udp, open_udp(local, port)
            self._relay.inbound()  # what the old one still holds, as far as a batch goes
            self._relay.rebind(new)
            old.close()
        self._interface.mtu = mtu
        if check != self._relay.check:
            self._relay.restrict(check)
        engine = header.get("engine", self._wanted)
        if engine != self._wanted:
            if engine == OFFLOAD and not self._relay.header and self._predecessor < 0:
                self._reopen(header=True)
            self._engage(str(engine))
        if "lasts" in header:
            set_lasting(self._relay.tun, on=bool(header["lasts"]))
        self._farewell = _words(header.get("farewell", self._farewell))
        return encode({})

    def _peers(self, _: _Client, __: Header, body: bytes) -> bytes:
        self._relay.update(body)
        return encode({})

    def _handover(self, client: _Client, header: Header, __: bytes) -> bytes:
        if not header.get("header"):  # an earlier release: it knows one packet in one datagram
            self._engage(PLAIN)
            if self._relay.header:
                self._reopen(header=False)
        reply = encode({})
        if client.unsent or socket.send_fds(client.sock, [reply], [self._relay.tun, self._relay.udp.fileno()]) != len(
            reply
        ):
            raise ConnectionError
        return b""

    def _taken(self, client: _Client, _: Header, __: bytes) -> bytes:
        self._owns_path = self._running = False
        client.finish(encode({"counters": self._relay.counters}))
        return b""

    def _stop(self, client: _Client, _: Header, __: bytes) -> bytes:
        self._running = False
        self._remove_path()
        with suppress(OSError):  # the device is gone already
            set_lasting(self._relay.tun, on=False)
        os.close(self._relay.tun)
        self._relay.udp.close()
        client.finish(encode({}))
        return b""


class _Client:
    """A control connection and what is under way on it."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.unread = bytearray()
        self.unsent = bytearray()

    def flush(self) -> None:
        """Send what the socket takes."""
        while self.unsent:
            try:
                del self.unsent[: self.sock.send(self.unsent)]
            except BlockingIOError:
                return

    def finish(self, last: bytes) -> None:
        """Send all, the last words of the keeper."""
        try:
            self.sock.settimeout(_TIMEOUT)
            self.sock.sendall(self.unsent + last)
        except OSError:
            pass  # it does not listen any more
        self.unsent.clear()


def _end_of(pid: object, connection: socket.socket) -> int:
    """A descriptor that is readable once a process has ended, and its descriptors are closed."""
    try:
        return os.pidfd_open(pid if isinstance(pid, int) else -1)
    except OSError:  # Linux before 5.3; of another PID namespace: the connection ends a little earlier
        return os.dup(connection.fileno())


def _check(state: Header) -> SourceCheck:
    """The rule for sources in a request or in what a keeper shows; raises ValueError."""
    network, _, length = str(state.get("network", "0.0.0.0/0")).partition("/")
    try:
        return SourceCheck(str(state["check"]), socket.inet_aton(network), int(length))
    except OSError:
        raise ValueError(f"no IPv4 network: {network}") from None


def _words(given: object) -> list[str]:
    return [str(word) for word in given] if isinstance(given, list) else []


def _ask(sock: socket.socket, header: Header, buffer: bytearray) -> tuple[Header, bytes]:
    sock.sendall(encode(header))
    return _reply(sock, buffer)


def _reply(sock: socket.socket, buffer: bytearray) -> tuple[Header, bytes]:
    while (frame := decode(buffer)) is None:
        data = sock.recv(_READ)
        if not data:
            raise ConnectionError(errno.ECONNRESET, "the running keeper ended before it handed over")
        buffer += data
    if "error" in frame[0]:
        raise OSError(errno.EPROTO, str(frame[0]["error"]))
    return frame
