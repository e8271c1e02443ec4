"""`wincey lab` as a user meets it: a process of its own, its output, its exit code, and what it leaves behind."""

import os
import signal
import subprocess
import time

import pytest

pytestmark = [pytest.mark.root, pytest.mark.etcd]

BROKEN = "sh -c 'echo no luck today; exit 3'"


def test_run_shows_a_table_and_leaves_nothing(sandbox, standin):
    done = sandbox.wincey("run", "--name", sandbox.name(), "--store=etcd3", f"--daemon=*={standin}", "--seconds=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6 of 6 pairs reachable"
    rows = [line for line in done.stdout.splitlines() if " ok " in line]
    assert [row.split()[1] for row in rows] == ["h1c1", "h2c1", "h3c1"]
    assert "Gbit/s" in done.stdout
    assert "hosts ready: 3 of 3" in done.stderr
    assert sandbox.leftovers() == []


def test_run_as_json_ends_in_one_object(sandbox, standin):
    words = ["run", "--name", sandbox.name(), "--store=etcd3", "--backend=host-gw", f"--daemon=*={standin}"]
    document = sandbox.json(*words, "--containers=2", "--hosts=2", "--seconds=1")
    assert (document["pairs"], document["reachable"], document["unreachable"]) == (12, 12, [])
    assert document["throughput"]["bits_per_second"] > 1e6
    assert document["failures"] == {}
    assert sandbox.leftovers() == []


def test_run_names_the_broken_host_and_its_pairs_and_fails(sandbox, standin):
    words = ["run", "--name", sandbox.name(), "--store=etcd3", f"--daemon=*={standin}", f"--daemon=h2={BROKEN}"]
    done = sandbox.wincey(*words, "--seconds=0")
    assert done.returncode == 1
    assert "h2: its daemon ended with exit code 3" in done.stdout
    assert "no luck today" in done.stdout
    for pair in ("h1c1 -> h2c1", "h2c1 -> h1c1", "h2c1 -> h3c1", "h3c1 -> h2c1"):
        assert f"{pair} (IPv4): h2 has no IPv4 subnet" in done.stdout
    assert done.stdout.splitlines()[-1] == "2 of 6 pairs reachable"
    assert sandbox.leftovers() == []


def test_a_lab_through_all_its_commands(sandbox, standin):
    name = sandbox.name()
    up = sandbox.wincey("up", "--name", name, "--hosts=2", "--store=etcd3", f"--daemon=*={standin}")
    assert up.returncode == 0, up.stderr
    assert "10.99.0.2/" not in up.stdout
    assert "10.99.0.2" in up.stdout
    assert sandbox.json("list") == {"labs": [name]}

    status = sandbox.json("status")
    assert [host["name"] for host in status["hosts"]] == ["h1", "h2"]
    assert all(os.path.exists(f"/proc/{host['pid']}") for host in status["hosts"])
    assert status["store"] == {"type": "etcd3", "url": "http://10.99.0.254:2379", "running": True}

    matrix = sandbox.json("ping", "--wait=10", "--count=2")
    assert (matrix["pairs"], matrix["reachable"], matrix["unreachable"]) == (2, 2, [])

    target = status["hosts"][1]["containers"][0]["addresses"][0]
    inside = sandbox.wincey("exec", "h1c1", "--", "ping", "-c1", "-W2", target)
    assert inside.returncode == 0
    assert "1 received" in inside.stdout
    assert sandbox.wincey("exec", "h1", "sh", "-c", "exit 7").returncode == 7
    document = sandbox.json("exec", "--name", name, "h2", "sh", "-c", "echo out; echo err >&2; exit 4")
    assert (document["stdout"], document["stderr"], document["exit_code"]) == ("out\n", "err\n", 4)
    wrong = sandbox.wincey("exec", "h3", "true")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(
        "wincey: no 'h3' in the lab: there are h1, h2, h1c1, h2c1, store, switch; did you mean"
    )

    assert "h1: lease /coreos.com/network/subnets/" in sandbox.wincey("logs").stdout
    logs = sandbox.json("logs", "h2", "-n", "1")
    assert list(logs["logs"]) == ["h2"]
    assert len(logs["logs"]["h2"]) == 1

    sandbox.wincey("exec", "h2c1", "--", "ip", "link", "set", "eth0", "down")
    cut = sandbox.wincey("ping")
    assert cut.returncode == 1
    assert "h1c1 -> h2c1 (IPv4)" in cut.stdout

    again = sandbox.wincey("up", "--name", name)
    assert again.returncode == 1
    assert f"lab {name} is up already" in again.stderr
    assert sandbox.wincey("down", "--name", name).returncode == 0
    assert sandbox.leftovers() == []
    assert "no lab is up" in sandbox.wincey("ping").stderr


def test_several_labs_need_a_name_and_end_all_at_once(sandbox):
    for suffix in ("a", "b"):
        daemon = "sh -c 'printf \"FLANNEL_SUBNET=10.5.1.1/24\\nFLANNEL_MTU=1400\\n\" > {subnet_file}; sleep 1000'"
        words = ["--name", sandbox.name(suffix), "--hosts=1", "--store=sqlite", f"--daemon=h1={daemon}"]
        done = sandbox.wincey("up", *words)
        assert done.returncode == 0, done.stderr
    ambiguous = sandbox.wincey("status")
    assert ambiguous.returncode == 2
    assert f"several labs are up ({sandbox.name('a')}, {sandbox.name('b')}): say which with --name" in ambiguous.stderr
    assert sandbox.wincey("exec", "--name", sandbox.name("b"), "h1c1", "ip", "addr").stdout.count("10.5.1.2/24") == 1
    assert sandbox.json("down", "--all") == {"down": [sandbox.name("a"), sandbox.name("b")]}
    assert sandbox.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "moment", ["making", "starting the etcd3", "starting the daemons", "pairs reachable", "measuring"]
)
def test_interrupted_at_any_moment_it_leaves_nothing(sandbox, standin, number, moment):
    words = ["run", "--name", sandbox.name(), "--hosts=4", "--store=etcd3", f"--daemon=*={standin}", "--seconds=30"]
    with subprocess.Popen(sandbox.argv(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for line in process.stderr:
            if line.startswith(moment):
                break
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)  # impatient
        output, errors = process.communicate(timeout=30)
    assert process.returncode == (130 if number == signal.SIGINT else 128 + number), errors
    assert output == ""
    assert "Traceback" not in errors
    assert sandbox.leftovers() == []


def test_ctrl_c_on_a_terminal_reaches_the_whole_group_and_leaves_nothing(sandbox):
    # As a terminal does it: SIGINT to every process of the foreground group, helper programs included.
    words = ["up", "--name", sandbox.name(), "--hosts=2", "--store=etcd3", "--daemon=*=sh -c 'sleep 1000; true'"]
    with subprocess.Popen(
        sandbox.argv(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, process_group=0
    ) as process:
        for line in process.stderr:
            if line.startswith("starting the daemons"):
                break
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert errors.endswith("wincey: interrupted\n")
    assert sandbox.leftovers() == []


@pytest.mark.parametrize("moment", ["making", "starting the daemons", "pairs reachable"])
def test_after_a_kill_down_finds_everything(sandbox, standin, moment):
    words = ["run", "--name", sandbox.name(), "--store=etcd3", f"--daemon=*={standin}", "--seconds=30"]
    with subprocess.Popen(
        sandbox.argv(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr:
            if line.startswith(moment):
                break
        process.kill()
    assert sandbox.leftovers() != []
    assert sandbox.json("down", "--all") == {"down": [sandbox.name()]}
    assert sandbox.leftovers() == []
