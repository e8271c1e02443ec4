"""The keeper: the process that holds a tunnel. One epoll loop over the device, the socket and the control connections.

It starts detached from any daemon, and no daemon's end touches it. A batch of packets each way, then whoever has
something to say on the control socket: neither starves the other.

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

from wincey.tunnel.control import BUILD, DirectoryAddress, Header, connect, decode, encode
from wincey.tunnel.device import Interface, open_tun, open_udp
from wincey.tunnel.relay import Relay
from wincey.tunnel.successor import Successor

_TIMEOUT = 5.0  # seconds a keeper waits for the one it takes over from
_READ = 1 << 16  # bytes read from a control connection at once


class Keeper:
    """A tunnel in this process: made anew or taken over. `run` forwards until the end."""

    def __init__(self, control: str, tun: int, udp: socket.socket) -> None:
        self._control = control
        self._interface = Interface(tun)
        self._relay = Relay(tun, udp, self._interface.refuse)
        self._clients: dict[int, _Client] = {}
        self._running = True
        self._owns_path = False
        self._listener = self._listen()

    @classmethod
    def create(cls, control: str, device: str, mtu: int, local: str, port: int) -> Keeper:
        """Make device and socket; raises OSError, EBUSY when another process holds the device."""
        tun = open_tun(device)
        keeper = cls(control, tun, open_udp(local, port))
        keeper._interface.mtu = mtu
        keeper.publish()
        return keeper

    @classmethod
    def take_over(cls, control: str) -> Keeper:
        """Go on in the place of the keeper behind `control`, which ends; raises OSError or ValueError if it did not.

        Device and socket are the same open files, so what is queued in them stays. The other one forwards until this one
        is complete, and again if this one fails: no packet is lost.
        """
        with connect(control, blocking=True) as sock:
            sock.settimeout(_TIMEOUT)
            sock.sendall(encode({"do": "handover"}))
            data, descriptors, _, _ = socket.recv_fds(sock, _READ, 2)
            buffer = bytearray(data)
            _reply(sock, buffer)
            if len(descriptors) != 2:
                raise OSError(errno.EPROTO, "the running keeper handed over no descriptors")
            state, peers = _ask(sock, {"do": "show", "peers": True}, buffer)
            tun, udp = descriptors
            keeper = cls(control, tun, socket.socket(fileno=udp))
            keeper._relay.update(peers)
            counters = state["counters"]
            if isinstance(counters, dict):
                keeper._relay.counters.update(counters)
            _ask(sock, {"do": "taken"}, buffer)
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
            if error.errno != errno.EBADFD:  # the kernel's word for a deleted device
                raise
        finally:
            self._remove_path()

    def _loop(self) -> None:
        poll = self._poll = select.epoll()
        successor = Successor()
        tun, listener, rivals = self._relay.tun, self._listener.fileno(), successor.socket.fileno()
        for descriptor in (tun, self._relay.udp.fileno(), listener, rivals):
            poll.register(descriptor, select.EPOLLIN)
        while self._running:
            for descriptor, events in poll.poll():
                if not self._running:
                    return
                if descriptor == tun:
                    self._relay.outbound()
                elif descriptor in self._clients:
                    self._serve(self._clients[descriptor], events)
                elif descriptor == listener:
                    self._accept()
                elif descriptor == rivals:
                    name = self._interface.name  # "" when the device was moved to another namespace
                    wanted = successor.came_and_went(name, self._interface.address() if name else b"-")
                    if wanted and not self._clients:
                        return
                else:
                    self._relay.inbound()

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
        }
        return encode(state, self._relay.table.records() if header.get("peers") else b"")

    def _configure(self, _: _Client, header: Header, __: bytes) -> bytes:
        mtu, local, port = header["mtu"], header["local"], header["port"]
        if not (isinstance(mtu, int) and isinstance(local, str) and isinstance(port, int)):
            raise ValueError("configure needs mtu, local and port")
        if (local, port) != self._relay.udp.getsockname():
            old, new = self._relay.udp, open_udp(local, port)
            self._relay.inbound()  # what the old one still holds, as far as a batch goes
            self._relay.rebind(new)
            self._poll.unregister(old.fileno())
            self._poll.register(new.fileno(), select.EPOLLIN)
            old.close()
        self._interface.mtu = mtu
        return encode({})

    def _peers(self, _: _Client, __: Header, body: bytes) -> bytes:
        self._relay.update(body)
        return encode({})

    def _handover(self, client: _Client, _: Header, __: bytes) -> bytes:
        reply = encode({})
        if client.unsent or socket.send_fds(client.sock, [reply], [self._relay.tun, self._relay.udp.fileno()]) != len(
            reply
        ):
            raise ConnectionError
        return b""

    def _taken(self, client: _Client, _: Header, __: bytes) -> bytes:
        self._owns_path = self._running = False
        client.finish(encode({}))
        return b""

    def _stop(self, client: _Client, _: Header, __: bytes) -> bytes:
        self._running = False
        self._remove_path()
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
