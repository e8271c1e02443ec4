"""mk-docker-opts.sh under each shell that may stand behind /bin/sh (compatibility reference, section 4.3)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "mk-docker-opts.sh"
SHELLS = ["dash", "bash", "bash --posix", "busybox sh"]
ENV_FILE = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.74.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n"  # as flanneld has it
BIP = 'DOCKER_OPT_BIP="--bip=10.1.74.1/24"\n'
IPMASQ = 'DOCKER_OPT_IPMASQ="--ip-masq=true"\n'
MTU = 'DOCKER_OPT_MTU="--mtu=1472"\n'
COMBINED = '=" --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"\n'


class Runner:
    """Runs the script under one shell in a directory of its own."""

    def __init__(self, shell: str, directory: Path) -> None:
        self.shell = shell.split()
        self.env_file = directory / "subnet.env"
        self.output = directory / "docker opts.env"
        self.env_file.write_text(ENV_FILE)

    def __call__(self, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.shell, str(SCRIPT), "-f", str(self.env_file), "-d", str(self.output), *options],
            env={"PATH": os.environ["PATH"], **environment},
            cwd=self.env_file.parent,
            capture_output=True,
            text=True,
            check=False,
        )

    def written(self, *options: str, **environment: str) -> str:
        done = self(*options, **environment)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        return self.output.read_text()

    def read_back(self, name: str) -> str:
        """A variable of the output as a shell that sources it sees it, between brackets."""
        command = f'. "$1"; printf "[%s]" "${name}"'
        done = subprocess.run(
            [*self.shell, "-c", command, "sh", self.output], capture_output=True, text=True, check=True
        )
        return done.stdout


@pytest.fixture(params=SHELLS)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    if not shutil.which(request.param.split()[0]):
        pytest.skip(f"no {request.param.split()[0]} on this machine")
    return Runner(request.param, tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ([], BIP + IPMASQ + MTU + "DOCKER_OPTS" + COMBINED),
        (["-i"], BIP + IPMASQ + MTU),
        (["-c"], "DOCKER_OPTS" + COMBINED),
        (["-k", "CUSTOM_KEY"], BIP + IPMASQ + MTU + "CUSTOM_KEY" + COMBINED),
        (["-m"], BIP + MTU + 'DOCKER_OPTS=" --bip=10.1.74.1/24 --mtu=1472"\n'),
        (["-i", "-c"], BIP + IPMASQ + MTU + "DOCKER_OPTS" + COMBINED),
        (["-mck", "X"], 'X=" --bip=10.1.74.1/24 --mtu=1472"\n'),
    ],
)
def test_output_is_byte_exact(run: Runner, options: list[str], expected: str) -> None:
    assert run.written(*options) == expected


def test_docker_leaves_masquerading_to_flannel(run: Runner) -> None:
    run.env_file.write_text(ENV_FILE.replace("IPMASQ=false", "IPMASQ=true"))
    assert 'DOCKER_OPT_IPMASQ="--ip-masq=false"\n' in run.written()


@pytest.mark.parametrize("option", ["-h", "-?", "-x", "--help", "-f"])
def test_usage_is_an_error(run: Runner, option: str) -> None:
    done = run(option)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("usage: ")
    assert not run.output.exists()


@pytest.mark.parametrize("value", ["maybe", "TRUE", "1"])
def test_masquerading_that_is_neither_true_nor_false(run: Runner, value: str) -> None:
    run.env_file.write_text(ENV_FILE.replace("IPMASQ=false", f"IPMASQ={value}"))
    done = run()
    assert done.returncode == 1
    assert f'FLANNEL_IPMASQ is "{value}"' in done.stderr
    assert not run.output.exists()
    assert "IPMASQ" not in run.written("-m"), "-m does not look at it"


def test_without_an_env_file(run: Runner) -> None:
    run.env_file.unlink()
    assert run.written() == 'DOCKER_OPTS=""\n'


@pytest.mark.parametrize(("missing", "left"), [("SUBNET", IPMASQ + MTU), ("MTU", BIP + IPMASQ), ("IPMASQ", BIP + MTU)])
def test_only_what_is_set_is_written(run: Runner, missing: str, left: str) -> None:
    lines = [line for line in ENV_FILE.splitlines(keepends=True) if f"_{missing}=" not in line]
    run.env_file.write_text("".join(lines))
    assert run.written("-i") == left


def test_output_of_an_earlier_run_is_gone(run: Runner) -> None:
    run.output.write_text("OLD=1\n" * 100)
    assert run.written("-i") == BIP + IPMASQ + MTU


def test_existing_options_come_first(run: Runner) -> None:
    assert run.written("-c", DOCKER_OPTS="--foo") == (
        'DOCKER_OPTS="--foo  --bip=10.1.74.1/24 --ip-masq=true --mtu=1472"\n'
    )
    assert run.written("-c", "-k", "OTHER", DOCKER_OPTS="--foo", OTHER="--bar").startswith('OTHER="--bar  --bip=')


def test_inherited_options_are_sorted_in(run: Runner) -> None:
    assert run.written(DOCKER_OPT_A="--a", DOCKER_OPT_M="--m", DOCKER_OPT_Z="--z") == (
        'DOCKER_OPT_A="--a"\n' + BIP + IPMASQ + 'DOCKER_OPT_M="--m"\n' + MTU + 'DOCKER_OPT_Z="--z"\n'
        'DOCKER_OPTS=" --a --bip=10.1.74.1/24 --ip-masq=true --m --mtu=1472 --z"\n'
    )


def test_options_set_in_the_env_file_count(run: Runner) -> None:
    run.env_file.write_text(ENV_FILE + 'DOCKER_OPT_DNS="--dns=10.0.0.1 --dns=10.0.0.2"\n')
    assert 'DOCKER_OPT_DNS="--dns=10.0.0.1 --dns=10.0.0.2"\n' in run.written()


@pytest.mark.parametrize(
    "value",
    [
        "--label=two words",
        "  blanks  around  ",
        "tab\there",
        "*",
        'say "hi"',
        "$HOME",
        "`id`",
        "back\\slash",
        "two\nlines",
    ],
)
def test_values_arrive_intact(run: Runner, value: str) -> None:
    run.written(DOCKER_OPT_X=value)
    assert run.read_back("DOCKER_OPT_X") == f"[{value}]"
    run.written("-c", DOCKER_OPTS=value)
    assert run.read_back("DOCKER_OPTS") == f"[{value}  --bip=10.1.74.1/24 --ip-masq=true --mtu=1472]"


def test_no_variable_is_invented(run: Runner) -> None:
    """Neither from text inside another variable, nor from functions, nor from names that are near misses."""
    text = run.written(
        NOTE="first\nDOCKER_OPT_FAKE=1\n  DOCKER_OPT_INDENTED=1", DOCKER_OPTION="1", MY_DOCKER_OPT_X="1", DOCKER_OPT="1"
    )
    assert text == BIP + IPMASQ + MTU + "DOCKER_OPTS" + COMBINED


@pytest.mark.parametrize("key", ["", "1ST", "A B", "X$(touch pwned)", "a-b"])
def test_a_key_must_be_a_variable_name(run: Runner, key: str) -> None:
    done = run("-k", key)
    assert done.returncode == 1
    assert "not the name of a variable" in done.stderr
    assert not run.output.exists()
    assert not (run.env_file.parent / "pwned").exists()


def test_a_file_name_without_a_slash_is_of_this_directory(run: Runner) -> None:
    done = subprocess.run(
        [*run.shell, SCRIPT, "-f", "subnet.env", "-d", "out", "-c"],
        cwd=run.env_file.parent,
        check=False,
        env=os.environ,
    )
    assert done.returncode == 0
    assert (run.env_file.parent / "out").read_text() == "DOCKER_OPTS" + COMBINED


def test_output_that_cannot_be_written(run: Runner) -> None:
    run.output = run.output.parent / "absent" / "file"
    done = run()
    assert done.returncode == 1
    assert f"could not write {run.output}" in done.stderr


def test_stray_words_are_told(run: Runner) -> None:
    done = run("word", "-i")
    assert done.returncode == 0
    assert "ignored: word -i" in done.stderr
    assert run.output.read_text() == BIP + IPMASQ + MTU + "DOCKER_OPTS" + COMBINED


@pytest.mark.root
@pytest.mark.parametrize(
    ("subnet", "route", "found"),
    [
        ("10.1.74.1/24", "10.1.74.0/24 via 192.0.2.1", "10.1.74.0/24"),
        ("10.1.74.129/26", "10.1.74.128/26 via 192.0.2.1 dev eth0", "10.1.74.128/26"),
        ("10.1.74.1/24", "10.1.74.0/24 dev eth0", None),  # this host's own bridge
        ("10.1.74.1/24", "10.1.75.0/24 via 192.0.2.1", None),
        ("10.1.74.1/24", "10.1.0.0/16 via 192.0.2.1", None),
        ("not-a-subnet", "10.1.74.0/24 via 192.0.2.1", None),
    ],
)
def test_a_subnet_reached_through_another_machine(run: Runner, subnet: str, route: str, found: str | None) -> None:
    """Run in a network namespace without a name, which goes when its process does."""
    run.env_file.write_text(ENV_FILE.replace("10.1.74.1/24", subnet))
    setup = f"ip link add eth0 type bridge && ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up && ip route add {route}"
    run.shell = ["unshare", "--net", "sh", "-c", f'{setup} && exec "$@"', "sh", *run.shell]
    done = run("-c")
    assert run.output.read_text().startswith(f'DOCKER_OPTS=" --bip={subnet} '), "written all the same"
    if found:
        assert (done.returncode, done.stderr) == (1, f"Your routing table already contains the subnet: {found}\n")
    else:
        assert (done.returncode, done.stderr) == (0, "")
