"""The plugin as a program, with a delegate that only writes down what it is told: commands, variables, errors, state."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from support.cni import Plugin

VERSIONS = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]
BRIDGE = """#!/bin/sh
# Plays a delegate: keeps what it was given, says what it was told to say.
[ "$CNI_COMMAND" = VERSION ] && { cat "$DIR/version"; exit; }
cat > "$DIR/$CNI_COMMAND.stdin"; env | grep ^CNI_ > "$DIR/$CNI_COMMAND.env"
echo "$CNI_COMMAND $CNI_CONTAINERID $CNI_IFNAME" >> "$DIR/calls"
[ -e "$DIR/fail" ] && { cat "$DIR/fail"; exit 1; }
[ -e "$DIR/die" ] && kill -9 $$
[ "$CNI_COMMAND" = ADD ] && echo '{"cniVersion":"1.0.0","ips":[]}'
exit 0
"""


@pytest.fixture
def plugin(tmp_path):
    plugin = Plugin(tmp_path, standard=False)
    delegate = plugin.bin / "bridge"
    delegate.write_text(BRIDGE.replace("$DIR", str(tmp_path)))
    delegate.chmod(0o755)
    (tmp_path / "version").write_text('{"supportedVersions": ["1.0.0"]}')
    plugin.write_env()
    return plugin


@pytest.fixture
def netns(tmp_path):
    """A path that stands for a namespace: the plugin itself never enters one."""
    path = tmp_path / "netns"
    path.touch()
    return str(path)


def stdin(plugin, command):
    return (plugin.directory / f"{command}.stdin").read_text()


def calls(plugin):
    path = plugin.directory / "calls"
    return path.read_text().splitlines() if path.exists() else []


def add(plugin, netns, **more):
    answer = plugin.call("ADD", plugin.conf(**more.pop("conf", {})), netns=netns, **more)
    assert answer.code == 0, answer
    return answer


class TestAdd:
    def test_the_delegates_answer_is_ours(self, plugin, netns):
        answer = add(plugin, netns)
        assert answer.stdout == '{"cniVersion":"1.0.0","ips":[]}\n'
        state = plugin.state / "c1"
        assert stdin(plugin, "ADD") == state.read_text()
        assert "netconf sent to delegate plugin:\n" + state.read_text() in answer.stderr
        assert (state.stat().st_mode & 0o777, plugin.state.stat().st_mode & 0o777) == (0o600, 0o700)

    def test_the_delegate_gets_our_variables(self, plugin, netns):
        add(plugin, netns, CNI_ARGS="K8S_POD_NAME=p;IgnoreUnknown=1")
        variables = set((plugin.directory / "ADD.env").read_text().splitlines())
        assert {
            "CNI_COMMAND=ADD",
            "CNI_CONTAINERID=c1",
            f"CNI_NETNS={netns}",
            "CNI_IFNAME=eth0",
            "CNI_ARGS=K8S_POD_NAME=p;IgnoreUnknown=1",
            f"CNI_PATH={plugin.bin}",
        } <= variables

    @pytest.mark.parametrize("version", [*VERSIONS, None])
    def test_every_version(self, plugin, netns, version):
        add(plugin, netns, conf={"version": version})
        assert json.loads(stdin(plugin, "ADD")).get("cniVersion") == version

    def test_the_delegates_error_is_ours(self, plugin, netns):
        (plugin.directory / "fail").write_text('{"code": 11, "msg": "try again later"}')
        answer = plugin.call("ADD", plugin.conf(), netns=netns)
        assert (answer.code, answer.json) == (1, {"code": 11, "msg": "try again later"})

    def test_missing_delegate_leaves_nothing(self, plugin, netns):
        answer = plugin.call("ADD", plugin.conf(delegate={"type": "macvlan"}), netns=netns)
        assert answer.json["code"] == 999
        assert answer.json["msg"] == f'failed to find plugin "macvlan" in path [{plugin.bin}]'
        assert not plugin.state.exists()

    def test_a_delegate_that_is_no_program(self, plugin, netns):
        (plugin.bin / "bridge").write_bytes(b"\x7fELF-no")
        answer = plugin.call("ADD", plugin.conf(), netns=netns)
        assert answer.json["code"] == 999
        assert "Exec format error" in answer.json["msg"]

    def test_without_subnet_env(self, plugin, netns):
        plugin.subnet_file.unlink()
        answer = plugin.call("ADD", plugin.conf(), netns=netns)
        assert (
            answer.json["msg"] == f"loadFlannelSubnetEnv failed: open {plugin.subnet_file}: no such file or directory"
        )
        assert "flanneld" in answer.json["details"]
        assert not plugin.state.exists()

    def test_state_that_can_not_be_written(self, plugin, netns):
        plugin.state.write_text("in the way")
        answer = plugin.call("ADD", plugin.conf(), netns=netns)
        assert answer.json["msg"].startswith("failed to save the state for DEL")
        assert not calls(plugin)

    def test_whoever_kills_us_kills_the_delegate(self, plugin, netns):
        """A killed ADD must not go on behind the runtime's back."""
        (plugin.bin / "bridge").write_text("#!/bin/sh\necho started\nexec sleep 60\n")
        process = subprocess.Popen(
            plugin.argv(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=plugin.environment("ADD", "c1", netns, "eth0"),
        )
        process.stdin.write(json.dumps(plugin.conf()).encode())
        process.stdin.close()
        assert process.stdout.readline() == b"started\n"
        process.kill()
        assert process.wait(10) == -signal.SIGKILL
        assert process.stdout.read() == b""  # the end of the pipe: nobody has it open any more
        process.stdout.close()
        assert (plugin.state / "c1").exists()  # for the runtime's DEL


class TestDel:
    def test_the_delegate_gets_what_add_gave_it(self, plugin, netns):
        add(plugin, netns)
        before = stdin(plugin, "ADD")
        plugin.subnet_file.unlink()  # what there is by now does not matter
        answer = plugin.call("DEL", plugin.conf(delegate={"type": "ptp"}), netns=netns)
        assert (answer.code, answer.stdout) == (0, "")
        assert stdin(plugin, "DEL") == before
        assert [*plugin.state.rglob("*")] == [plugin.state / ".attachments"]

    def test_twice_and_without_netns(self, plugin, netns):
        add(plugin, netns)
        for _ in range(2):
            assert plugin.call("DEL", plugin.conf()).code == 0
        assert calls(plugin) == ["ADD c1 eth0", "DEL c1 eth0"]

    @pytest.mark.parametrize("how", ["fail", "die"])
    def test_a_failure_keeps_the_state_for_the_next_attempt(self, plugin, netns, how):
        """With flannel the second attempt does nothing, and the address leaks."""
        add(plugin, netns)
        (plugin.directory / how).write_text('{"code": 11, "msg": "busy", "details": "try again"}')
        answer = plugin.call("DEL", plugin.conf(), netns=netns)
        assert answer.code == 1
        assert answer.json["msg"] == ("busy" if how == "fail" else f"{plugin.bin}/bridge ended with signal 9")
        (plugin.directory / how).unlink()
        assert plugin.call("DEL", plugin.conf(), netns=netns).code == 0
        assert calls(plugin) == ["ADD c1 eth0", "DEL c1 eth0", "DEL c1 eth0"]
        assert not (plugin.state / "c1").exists()

    def test_missing_delegate_keeps_the_state(self, plugin, netns):
        add(plugin, netns)
        (plugin.bin / "bridge").rename(plugin.bin / "away")
        assert plugin.call("DEL", plugin.conf()).json["code"] == 999
        assert (plugin.state / "c1").exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"type": 5}', "\0" * 300])
    def test_corrupt_state(self, plugin, netns, content):
        add(plugin, netns)
        before = stdin(plugin, "ADD")
        (plugin.state / "c1").write_text(content)
        answer = plugin.call("DEL", plugin.conf(), netns=netns)
        assert answer.code == 0
        assert f"{plugin.state}/c1 can't be read" in answer.stderr
        assert stdin(plugin, "DEL") == before  # made anew of what there is
        assert not (plugin.state / "c1").exists()

    def test_nothing_is_known_and_nothing_can_be_done(self, plugin, netns):
        plugin.subnet_file.unlink()
        assert plugin.call("DEL", plugin.conf(), netns=netns).code == 0
        assert not calls(plugin)

    def test_a_container_in_two_networks(self, plugin, netns):
        """They share a file in flannel's state directory, where the second overwrites the first."""
        add(plugin, netns, conf={"name": "one"})
        add(plugin, netns, conf={"name": "two"}, interface="eth1")
        for name, interface in (("one", "eth0"), ("two", "eth1")):
            assert plugin.call("DEL", plugin.conf(name=name), netns=netns, interface=interface).code == 0
            assert json.loads(stdin(plugin, "DEL"))["name"] == name
        assert calls(plugin)[2:] == ["DEL c1 eth0", "DEL c1 eth1"]
        assert not (plugin.state / "c1").exists()

    def test_state_of_flannel(self, plugin, netns):
        """What flannel's plugin has added before it was replaced; also the form with a single subnet."""
        plugin.state.mkdir()
        text = '{"ipam":{"subnet":"10.1.17.0/24","type":"host-local"},"name":"cni-flannel","type":"bridge"}'
        (plugin.state / "c1").write_text(text)
        assert plugin.call("DEL", plugin.conf(), netns=netns).code == 0
        assert stdin(plugin, "DEL") == text
        assert not (plugin.state / "c1").exists()


RESULT = {
    "cniVersion": "1.0.0",
    "ips": [
        {"address": "10.1.17.2/24", "gateway": "10.1.17.1"},
        {"address": "fc00::2/64", "gateway": "fc00::1"},
    ],
    "routes": [{"dst": "10.1.0.0/16"}, {"dst": "fc00::/48"}, {"dst": "10.9.0.0/16", "gw": "10.1.17.9"}],
}


class TestCheck:
    def test_the_delegate_looks(self, plugin, netns):
        add(plugin, netns)
        assert plugin.call("CHECK", plugin.conf(prevResult=RESULT), netns=netns).code == 0
        given = json.loads(stdin(plugin, "CHECK"))
        previous = given.pop("prevResult")
        assert given == json.loads(stdin(plugin, "ADD"))
        assert [route["gw"] for route in previous["routes"]] == ["10.1.17.1", "fc00::1", "10.1.17.9"]

    @pytest.mark.parametrize(
        ("spoil", "code", "words"),
        [
            ("result", 7, "prevResult is missing"),
            ("state", 999, "was not added, or was deleted since"),
            ("text", 999, "can't be read"),
            ("subnet", 999, "this host's subnet is 10.1.99.0/24, the container's address is of 10.1.17.0/24"),
        ],
    )
    def test_what_is_wrong_is_said(self, plugin, netns, spoil, code, words):
        add(plugin, netns)
        conf = plugin.conf() if spoil == "result" else plugin.conf(prevResult=RESULT)
        if spoil == "state":
            (plugin.state / "c1").unlink()
        elif spoil == "text":
            (plugin.state / "c1").write_text("?")
        elif spoil == "subnet":
            plugin.subnet_file.write_text(plugin.subnet_file.read_text().replace("10.1.17", "10.1.99"))
        answer = plugin.call("CHECK", conf, netns=netns)
        assert answer.json["code"] == code
        assert words in answer.json["msg"]
        assert "CHECK c1 eth0" not in calls(plugin)


class TestGc:
    def gc(self, plugin, *valid, **more):
        pairs = [{"containerID": container, "ifname": interface} for container, interface in valid]
        return plugin.call("GC", plugin.conf(version="1.1.0", **{"cni.dev/valid-attachments": pairs}), **more)

    def test_attachments_that_are_not_valid_are_undone(self, plugin, netns):
        for container in ("c1", "c2", "c3"):
            add(plugin, netns, container=container)
        assert self.gc(plugin, ("c2", "eth0")).code == 0
        assert calls(plugin)[3:] == ["DEL c1 eth0", "DEL c3 eth0"]
        assert f"CNI_NETNS={netns}" in (plugin.directory / "DEL.env").read_text().splitlines()
        assert sorted(path.name for path in plugin.state.rglob("*")) == [".attachments", "c2", "c2:eth0"]

    def test_a_namespace_that_is_another_one_by_now_is_left_alone(self, plugin, netns, tmp_path):
        add(plugin, netns)
        os.rename(netns, f"{netns}-old")  # keeps its inode from being used again
        (tmp_path / "netns").touch()
        assert self.gc(plugin).code == 0
        assert calls(plugin)[1:] == ["DEL c1 eth0"]
        assert "CNI_NETNS=" in (plugin.directory / "DEL.env").read_text().splitlines()

    @pytest.mark.parametrize("state", [True, False])
    def test_what_a_crash_cut_off(self, plugin, netns, state):
        add(plugin, netns, container="c1")
        add(plugin, netns, container="c9", conf={"name": "other"})
        for name in ("c1:eth0", "c9:eth0"):
            (plugin.state / ".attachments" / name).write_text("")
        if not state:
            (plugin.state / "c1").unlink()
        assert self.gc(plugin).code == 0
        assert sorted(path.name for path in plugin.state.rglob("*")) == [".attachments", "c9", "c9:eth0"]

    def test_other_networks_are_left_alone(self, plugin, netns):
        add(plugin, netns, conf={"name": "other"}, container="c9")
        (plugin.state / "flannels").write_text('{"name": "other", "type": "bridge"}')
        assert self.gc(plugin).code == 0
        assert calls(plugin) == ["ADD c9 eth0"]
        assert (plugin.state / "flannels").exists()

    def test_what_flannel_added(self, plugin):
        plugin.state.mkdir()
        for container in ("left", "valid", "torn"):
            text = '{"name": "cni-flannel", "type": "bridge"}'
            (plugin.state / container).write_text(text[:9] if container == "torn" else text)
        assert self.gc(plugin, ("valid", "net1")).code == 0
        assert calls(plugin) == ["DEL left eth0"]
        assert sorted(path.name for path in plugin.state.iterdir()) == ["valid"]

    def test_addresses_that_nobody_holds_are_freed(self, plugin):
        directory = plugin.leases / "cni-flannel"
        directory.mkdir(parents=True)
        for address, content in {
            "10.1.17.2": "c1\r\neth0",
            "10.1.17.3": "c2\r\neth0",
            "10.1.17.4": "c2\r\neth1",
            "10.1.17.5": "c3",
            "10.1.17.6": "c2",
            "last_reserved_ip.0": "10.1.17.6",
        }.items():
            (directory / address).write_text(content)
        assert self.gc(plugin, ("c2", "eth0")).code == 0
        assert plugin.addresses() == ["10.1.17.3", "10.1.17.6"]
        assert (directory / "last_reserved_ip.0").exists()

    def test_without_a_list_nothing_is_touched(self, plugin, netns):
        add(plugin, netns)
        answer = plugin.call("GC", plugin.conf(version="1.1.0"))
        assert answer.json["code"] == 7
        assert (plugin.state / "c1").exists()

    def test_a_delegate_that_knows_gc_is_asked_too(self, plugin):
        (plugin.directory / "version").write_text('{"supportedVersions": ["1.0.0", "1.1.0"]}')
        assert self.gc(plugin, ("c2", "eth0")).code == 0
        given = json.loads(stdin(plugin, "GC"))
        assert given["cni.dev/valid-attachments"] == [{"containerID": "c2", "ifname": "eth0"}]
        assert given["ipam"]["type"] == "host-local"

    def test_failures_are_told_at_the_end(self, plugin, netns):
        for container in ("c1", "c2"):
            add(plugin, netns, container=container)
        (plugin.directory / "fail").write_text('{"code": 11, "msg": "busy"}')
        answer = self.gc(plugin)
        assert answer.json["details"] == "c1 eth0: busy; c2 eth0: busy"
        assert {"c1", "c2"} <= {path.name for path in plugin.state.iterdir()}


class TestStatus:
    def status(self, plugin):
        return plugin.call("STATUS", plugin.conf(version="1.1.0"))

    def test_all_is_well(self, plugin):
        answer = self.status(plugin)
        assert (answer.code, answer.stdout) == (0, "")

    def test_no_subnet_env(self, plugin):
        plugin.subnet_file.unlink()
        answer = self.status(plugin)
        assert answer.json["code"] == 50
        assert "no such file" in answer.json["msg"]

    @pytest.mark.parametrize("there", [True, False])
    def test_the_daemons_own_reason(self, plugin, there):
        directory = plugin.directory / "wincey" / "subnet"
        directory.mkdir(parents=True)
        (directory / "not-ready").write_text("there is no network config at /x\n")
        if not there:
            plugin.subnet_file.unlink()
        answer = self.status(plugin)
        assert (answer.json["code"], answer.json["details"]) == (50, "there is no network config at /x")

    def test_missing_delegate(self, plugin):
        (plugin.bin / "bridge").unlink()
        assert self.status(plugin).json["code"] == 50

    def test_a_delegate_that_knows_status_is_asked_too(self, plugin):
        (plugin.directory / "version").write_text('{"supportedVersions": ["1.1.0"]}')
        (plugin.directory / "fail").write_text('{"code": 51, "msg": "limited"}')
        assert self.status(plugin).json["code"] == 51


class TestProtocol:
    def test_version(self, plugin):
        expected = '{"cniVersion":"1.1.0","supportedVersions":' + json.dumps(VERSIONS, separators=(",", ":")) + "}\n"
        assert plugin.call("VERSION", b"").stdout == expected

    def test_for_people(self, plugin):
        answer = plugin.call("", b"", container="", interface="")
        assert (answer.code, answer.stdout) == (0, "")
        assert "CNI protocol versions supported: 0.1.0, " in answer.stderr

    @pytest.mark.parametrize(
        ("command", "lacking"),
        [
            ("ADD", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
            ("CHECK", ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
            ("DEL", ["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
            ("GC", ["CNI_PATH"]),
            ("STATUS", ["CNI_PATH"]),
        ],
    )
    def test_required_variables(self, plugin, command, lacking):
        answer = plugin.call(command, plugin.conf(), container="", interface="", CNI_PATH="")
        assert answer.json == {"code": 4, "msg": f"required env variables [{','.join(lacking)}] missing"}

    @pytest.mark.parametrize(
        ("variables", "code"),
        [
            ({"container": "../../etc"}, 4),
            ({"container": "-c"}, 4),
            ({"interface": "a/b"}, 4),
            ({"interface": "sixteen-letters-"}, 4),
            ({"interface": ".."}, 4),
            ({"interface": "a b"}, 4),
            ({"netns": "/proc/self/ns/net"}, 8),
        ],
    )
    def test_bad_variables(self, plugin, netns, variables, code):
        answer = plugin.call("ADD", plugin.conf(), **{"netns": netns, **variables})
        assert (answer.code, answer.json["code"]) == (1, code)
        assert not calls(plugin)

    def test_own_netns_by_leave(self, plugin):
        add(plugin, "/proc/self/ns/net", CNI_NETNS_OVERRIDE="true")

    @pytest.mark.parametrize(
        ("command", "version", "ok"),
        [
            ("ADD", "0.0.9", False),
            ("ADD", "2.0.0", False),
            ("CHECK", "0.3.1", False),
            ("GC", "1.0.0", False),
            ("STATUS", "1.0.0", False),
            ("STATUS", "1.1.0", True),
        ],
    )
    def test_versions(self, plugin, netns, command, version, ok):
        answer = plugin.call(command, plugin.conf(version=version), netns=netns)
        assert (answer.code == 0) == ok
        if not ok:
            assert answer.json["code"] == 1

    def test_unknown_command(self, plugin):
        assert plugin.call("FROB", plugin.conf()).json["code"] == 4

    def test_undecodable(self, plugin, netns):
        assert plugin.call("ADD", b"{", netns=netns).json["code"] == 6

    def test_nothing_heavy_is_loaded_for_an_add(self, plugin, netns):
        """Each of these costs a third of the time that Python takes to start."""
        script = plugin.bin / "flannel"
        lines = script.read_text().splitlines()
        assert re.fullmatch(r"#!\S+ -IS", lines[0])
        (plugin.bin / "bridge").write_text("#!/bin/sh\n")
        code = "\n".join(lines).replace("main()", "os.execve = lambda *_: print(*sys.modules, flush=True)\nmain()")
        loaded = subprocess.run(
            [sys.executable, "-IS", "-c", "import os\n" + code],
            input=json.dumps(plugin.conf()).encode(),
            env=plugin.environment("ADD", "c1", netns, "eth0"),
            capture_output=True,
            check=True,
        ).stdout.split()
        assert b"wincey.cni.commands" in loaded
        heavy = {"json", "re", "enum", "typing", "socket", "subprocess", "ipaddress", "asyncio", "wincey.cni.collect"}
        assert not {name.encode() for name in heavy} & set(loaded)
