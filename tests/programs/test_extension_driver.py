"""The extension backend's commands, run for real: what they add is remembered, retried, taken back, in order."""

import asyncio
import logging
import os
import subprocess
import sys
import time

import pytest

from wincey.kernel.diff import diff
from wincey.model.command import Command, CommandFailed, CommandNetwork, CommandPeer
from wincey.model.errors import NotJoinable
from wincey.model.state import Scope
from wincey.programs.extension import memory as memory_module
from wincey.programs.extension.driver import CommandDriver
from wincey.programs.extension.running import process_environment, run
from wincey.programs.extension.start import forget_start, start_up


def sh(text):
    return Command((text,), sh=True)


class Host:
    """A host whose commands write what they do into a log, and keep what they add as files in a directory.

    Like `ip route add` and `del`: what is there can't be added again, and what is not there can't be removed.
    """

    def __init__(self, directory):
        self.directory, self.log, self.there = directory, directory / "log", directory / "there"
        self.there.mkdir()
        self.desired = {}
        self.start()

    def start(self):
        """The daemon starts (again)."""
        self.driver = CommandDriver(self.directory / "state")

    def network(self, after="", shutdown="", **fields):
        item = CommandNetwork(
            (("SUBNET", "10.3.1.0/24"),),
            after=sh(f"echo start >>{self.log}; {after}") if after else None,
            shutdown=sh(f"echo shutdown >>{self.log}; {shutdown}") if shutdown else None,
            **fields,
        )
        self.desired[item.key] = item

    def peer(self, number, data="", add="", remove="", **fields):
        name = "${SUBNET%/*}"
        item = CommandPeer(
            f"10.3.{number}.0/24",
            (("SUBNET", f"10.3.{number}.0/24"),),
            data,
            sh(f"read -r data; echo add {name} $data >>{self.log}; {add} set -C; echo $data >{self.there}/{name}"),
            sh(f"read -r data; echo remove {name} $data >>{self.log}; {remove} rm {self.there}/{name}"),
            **fields,
        )
        self.desired[item.key] = item

    def drop(self, number):
        del self.desired["command-peer", f"10.3.{number}.0/24"]

    async def audit(self):
        """What the reconciler does; returns the failures' reasons."""
        actual = await self.driver.observe(self.desired, Scope())
        return [failure.reason for failure in await self.driver.apply(diff(self.desired, actual))]

    def told(self):
        """What commands have run since the last call."""
        lines = self.log.read_text().split("\n")[:-1] if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return lines

    def added(self):
        return {path.name: path.read_text().strip() for path in self.there.iterdir()}


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path)
    made.network()
    return made


async def test_peers_are_added_and_removed_in_order(host):
    for number in range(2, 6):
        host.peer(number, f"key{number}")
    assert await host.audit() == []
    assert host.told() == [f"add 10.3.{number}.0 key{number}" for number in range(2, 6)]
    assert await host.audit() == []
    host.drop(3)
    host.peer(9, "key9")
    assert await host.audit() == []
    assert host.told() == ["remove 10.3.3.0 key3", "add 10.3.9.0 key9"]


async def test_a_changed_peer_is_removed_with_its_old_data(host):
    host.peer(2, "old")
    await host.audit()
    host.peer(2, "new")
    assert await host.audit() == []
    assert host.told() == ["add 10.3.2.0 old", "remove 10.3.2.0 old", "add 10.3.2.0 new"]
    assert host.added() == {"10.3.2.0": "new"}


async def test_another_removal_is_remembered_without_any_command(host):
    host.peer(2, "x")
    await host.audit()
    host.told()
    host.peer(2, "x", remove="echo other;")
    assert await host.audit() == []
    assert host.told() == []
    host.drop(2)
    assert await host.audit() == []
    assert host.told() == ["remove 10.3.2.0 x"]


async def test_a_restart_makes_up_for_what_came_and_went(host):
    for number in (2, 3):
        host.peer(number)
    await host.audit()
    host.told()
    host.start()
    host.drop(3)
    host.peer(4)
    assert await host.audit() == []
    assert host.told() == ["remove 10.3.3.0", "add 10.3.4.0"]
    assert set(host.added()) == {"10.3.2.0", "10.3.4.0"}


async def test_after_start_commands_all_peers_are_added_again(host):
    host.network(after=f"rm -f {host.there}/*")
    for number in (2, 3):
        host.peer(number)
    await host.audit()
    assert host.told() == ["start", "add 10.3.2.0", "add 10.3.3.0"]
    assert await host.audit() == []
    assert host.told() == []
    host.start()
    assert await host.audit() == []
    assert host.told() == ["start", "add 10.3.2.0", "add 10.3.3.0"]


async def test_a_peer_that_is_in_the_way_of_itself_is_removed_before_the_retry(host):
    host.network(after="true")
    host.peer(2, "x")
    await host.audit()
    host.start()
    [reason] = await host.audit()
    assert reason.startswith("SubnetAddCommand ended with exit code 2, and said: ")
    host.told()
    assert await host.audit() == []
    assert host.told() == ["remove 10.3.2.0 x", "add 10.3.2.0 x"]


async def test_one_failing_peer_does_not_keep_others(host):
    host.peer(2, add="echo no way >&2; exit 7;")
    host.peer(3)
    assert await host.audit() == ["SubnetAddCommand ended with exit code 7, and said: no way"]
    assert set(host.added()) == {"10.3.3.0"}


async def test_a_removal_that_goes_on_failing_is_given_up(host, caplog):
    host.peer(2, remove="echo already gone; exit 1;")
    await host.audit()
    host.told()
    host.drop(2)
    assert await host.audit() == ["SubnetRemoveCommand ended with exit code 1, and said: already gone"]
    assert len(await host.audit()) == 1
    assert await host.audit() == []
    assert "given up after 3 attempts" in caplog.text
    assert host.told() == ["remove 10.3.2.0"] * 3
    assert await host.audit() == []
    assert host.told() == []


async def test_peers_wait_for_a_start_that_fails(host):
    host.network(after="echo not yet; exit 1")
    host.peer(2)
    assert await host.audit() == [
        "PostStartupCommand ended with exit code 1, and said: not yet",
        "it waits for PostStartupCommand",
    ]
    host.network(after="true")
    host.told()
    assert await host.audit() == []
    assert host.told() == ["start", "add 10.3.2.0"]


async def test_clean_up_removes_and_shuts_down_and_leaves_no_file(host):
    host.network(after="true", shutdown="true")
    host.peer(2, "x")
    await host.audit()
    host.told()
    host.start()
    host.desired.clear()
    assert await host.audit() == []
    assert host.told() == ["remove 10.3.2.0 x", "shutdown"]
    assert list((host.directory / "state").iterdir()) == []


DIES = """
import asyncio, sys
from pathlib import Path
from wincey.model.command import Command, CommandPeer
from wincey.model.state import Changes
from wincey.programs.extension.driver import CommandDriver

def peer(number, then):
    name = Path(sys.argv[1]) / "there" / str(number)
    return CommandPeer(str(number), (), "", *(Command((text,), sh=True) for text in (f"touch {name}{then}", f"rm {name}")))

driver = CommandDriver(Path(sys.argv[1]) / "state")
peers = [peer(2, ""), peer(3, "; kill -9 $PPID"), peer(4, "")]
asyncio.run(driver.apply(Changes(put=peers)))
"""


async def test_what_a_daemon_was_doing_when_it_was_killed_is_taken_back(host):
    done = subprocess.run([sys.executable, "-c", DIES, str(host.directory)], timeout=60, check=False)
    assert done.returncode == -9
    assert host.added() == {"2": "", "3": ""}
    host.start()
    host.desired.clear()
    reasons = [await host.audit() for _ in range(4)]
    assert [len(each) for each in reasons] == [1, 1, 0, 0]  # the third one was never there
    assert host.added() == {}


async def test_another_boot_adds_all_again(host, tmp_path, monkeypatch):
    host.peer(2)
    await host.audit()
    host.told()
    for path in host.there.iterdir():
        path.unlink()
    boot = tmp_path / "boot"
    boot.write_text("another")
    monkeypatch.setattr(memory_module, "_BOOT", boot)
    host.start()
    assert await host.audit() == []
    assert host.told() == ["add 10.3.2.0"]


async def test_a_file_that_cannot_be_read_is_told(host, caplog):
    host.peer(2)
    await host.audit()
    (host.directory / "state" / "extension" / "added.json").write_text("{")
    host.start()
    assert "can't be read" in caplog.text


async def test_files_are_for_root_alone(host):
    host.peer(2)
    await host.audit()
    place = host.directory / "state" / "extension"
    assert place.stat().st_mode & 0o777 == 0o700
    assert (place / "added.json").stat().st_mode & 0o777 == 0o600


async def test_a_slow_command_is_killed_with_its_children(tmp_path):
    begin = time.monotonic()
    command = sh("echo working; sleep 300 & echo $! >child; sleep 300")
    with pytest.raises(CommandFailed, match="X did not end within 1 s and was killed, and said: working"):
        await run("X", command, (), tmp_path, timeout=1)
    assert time.monotonic() - begin < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(1000):
        if not _lives(child):
            return
        await asyncio.sleep(0.02)
    pytest.fail("its child lives on")


def _lives(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def test_what_a_command_leaves_running_is_not_waited_for(tmp_path):
    assert await run("X", sh("sleep 20 & echo $!"), (), tmp_path, timeout=15) != ""
    pid = int(await run("X", sh("sleep 20 & echo $!"), (), tmp_path, timeout=15))
    os.kill(pid, 9)


async def test_a_lot_of_output_and_of_input_blocks_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    out = await run("X", sh("yes | head -c 1000000"), (), tmp_path, timeout=30, text="y" * 200_000)
    assert len(out) <= 1 << 16
    assert max(len(line) for line in caplog.messages) < 1000


async def test_standard_output_and_errors_are_told_apart(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert await run("X", sh("cat; echo careful >&2"), (), tmp_path, timeout=30, text="a\nb", whom="me") == "a\nb"
    assert "X for me ended well after" in caplog.text
    assert caplog.messages[-1].endswith("and said: a | b | careful")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (Command(("no-such-program",)), "X can't be run: no-such-program is not installed"),
        (Command(("/etc/passwd",)), "X can't be run: /etc/passwd: Permission denied"),
        (Command(("echo", "$MTU")), r"X names \$MTU, which is not set here"),
        (sh("kill -TERM $$"), "X ended with signal SIGTERM"),
    ],
)
async def test_why_a_command_failed(tmp_path, command, words):
    with pytest.raises(CommandFailed, match=words):
        await run("X", command, (), tmp_path, timeout=30)


def test_the_daemons_secrets_and_variables_are_not_passed_on():
    inherited = {"PATH": "/bin", "HOME": "/root", "FLANNELD_ETCD_PASSWORD": "secret", "SUBNET": "wrong", "MTU": "9"}
    made = process_environment(inherited, (("SUBNET", "10.3.1.0/24"),))
    assert made == {"PATH": "/bin:/usr/sbin:/sbin", "HOME": "/root", "SUBNET": "10.3.1.0/24"}


async def test_the_start_runs_once_until_forgotten(tmp_path):
    command = sh("echo once >>log; wc -l <log")
    assert [await start_up(command, (), tmp_path, 30) for _ in range(3)] == ["1", "1", "1"]
    assert await start_up(sh("echo another"), (), tmp_path, 30) == "another"
    forget_start(tmp_path)
    assert await start_up(command, (), tmp_path, 30) == "2"
    forget_start(tmp_path)
    with pytest.raises(
        NotJoinable, match="the extension backend can't start: PreStartupCommand ended with exit code 4"
    ):
        await start_up(sh("exit 4"), (), tmp_path, 30)
