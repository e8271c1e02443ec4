"""A machine with flanneld, the Docker plugin and a Docker engine."""

from __future__ import annotations

import signal
import subprocess
import time

from support.machine import PROGRAMS, Machine


def until(check, what, seconds=60):
    """Wait for something that no program reports."""
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline, f"it did not come about: {what}"
        time.sleep(0.1)


# With the one capability that the unit of systemd leaves it.
_AS_THE_UNIT = ("setpriv", "--bounding-set=-all,+net_admin", "--inh-caps=-all,+net_admin", "--no-new-privs", "--")


class Engine(Machine):
    """A machine with the plugin beside its engine."""

    def __init__(self, host, directory, store):
        super().__init__(host, directory)
        self.store = store
        self._plugin = self._flanneld = None

    def start_flanneld(self, *flags, files=("/run/flannel/subnet.env",)):
        self.run("rm", "-f", *files)
        with (self.directory / "flanneld.log").open("ab") as log:
            self._flanneld = subprocess.Popen(
                self.argv(str(PROGRAMS / "flanneld"), f"--store={self.store}", "--iface=eth0", "--ip-masq", *flags),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        for file in files:
            self._until_there("-e", file, self._flanneld, "flanneld.log")

    def stop_flanneld(self):
        if self._flanneld:
            self._flanneld.terminate()
            self._flanneld.wait(30)
            self._flanneld = None

    def start_plugin(self):
        with (self.directory / "plugin.log").open("ab") as log:
            self._plugin = subprocess.Popen(
                self.argv(*_AS_THE_UNIT, str(PROGRAMS / "wincey"), "docker-plugin", "--store", self.store, "-v", "1"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        self._until_there("-S", "/run/docker/plugins/wincey.sock", self._plugin, "plugin.log")

    def _until_there(self, kind, path, process, log):
        def there():
            return self.run("test", kind, path).returncode == 0

        until(lambda: there() or process.poll() is not None, path)
        assert there(), (self.directory / log).read_text()[-3000:]

    def stop_plugin(self, number=signal.SIGTERM):
        if self._plugin:
            self._plugin.send_signal(number)
            self._plugin.wait(30)
            self._plugin = None

    def plugin_log(self):
        return (self.directory / "plugin.log").read_text()

    def docker(self, *arguments, refused=None):
        """Run docker; what it prints, or with `refused` the error that it must end with."""
        done = self.run("docker", *arguments, timeout=120)
        if refused is None:
            assert done.returncode == 0, f"docker {arguments}: {done.stderr}\n{self.plugin_log()[-4000:]}"
            return done.stdout.strip()
        assert done.returncode != 0, done.stdout
        assert refused in done.stderr, done.stderr
        return done.stderr

    def network(self, name, *options, refused=None):
        return self.docker(
            "network", "create", "-d", "wincey", "--ipam-driver", "wincey", *options, name, refused=refused
        )

    def start(self, name, network, *options):
        """Run a container; its address."""
        self.docker(
            *("run", "-d", "--name", name, "--network", network, "--stop-signal", "KILL", *options),
            *("busybox", "httpd", "-f", "-p", "80", "-h", "/www"),
        )
        return self.address(name)

    def address(self, name):
        return self.docker("inspect", "-f", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", name)

    def reaches(self, container, address):
        return self.run("docker", "exec", container, "ping", "-c", "1", "-W", "2", address).returncode == 0

    def reached(self, container, addresses):
        """Those of some addresses that a container reaches, all tried at once."""
        script = "for a in $0 $@; do (ping -c 2 -i 0.5 -W 1 $a >/dev/null && echo $a) & done; wait"
        return set(self.docker("exec", container, "sh", "-c", script, *addresses).split())

    def fetches(self, container, address):
        return "Welcome" in self.run("docker", "exec", container, "sh", "-c", _fetch(address)).stdout

    def fetches_itself(self, address):
        """Whether a program of the host gets the page."""
        return "Welcome" in self.run("sh", "-c", _fetch(address, "busybox nc")).stdout

    def left_behind(self):
        """What a plugin may leave on a host: its devices and its rules."""
        devices = [line.split(":")[1].strip() for line in self.sh("ip -o link").splitlines()]
        tables = self.sh("nft list tables").splitlines()
        return [each for each in devices if each[:3] in {"wb-", "wv-", "wc-"}] + [
            each for each in tables if "wincey" in each
        ]

    def close(self):
        try:
            super().close()
        finally:
            self.stop_plugin()
            self.stop_flanneld()


def _fetch(address, nc="nc"):
    host, _, port = address.partition(":")  # busybox's own wget does not work everywhere
    return f"printf 'GET / HTTP/1.0\\r\\n\\r\\n' | timeout 5 {nc} -w 3 {host} {port or 80}"
