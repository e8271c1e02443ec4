"""`wincey` itself and `wincey config`: help, versions, one clear line for each mistake."""

import os
import subprocess
import sys

import pytest

from wincey import __version__
from wincey.lab import needs
from wincey.lab.errors import LabError
from wincey.lab.plan import LabSpec, network_config

CONFIG = '{"Network": "10.3.0.0/16", "Backend": {"Type": "host-gw"}}\n'


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def wincey(*words, stdin="", **options):
    argv = [sys.executable, "-m", "wincey.cli.wincey", *words]
    return subprocess.run(argv, input=stdin, capture_output=True, text=True, timeout=60, check=False, **options)


def test_help_gives_examples_for_every_level():
    for words in ([], ["lab"], ["lab", "up"], ["lab", "run"], ["lab", "exec"]):
        done = wincey(*words, "--help")
        assert done.returncode == 0
        assert "Examples:\n" in done.stdout
        assert "wincey lab" in done.stdout


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_version(words):
    assert __version__ in wincey(*words).stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["lap"], 2, "version, web; did you mean lab?"),
        (["lab", "upp"], 2, "'upp'"),
        (["lab", "up", "--host=3"], 2, "--hosts"),
        (["lab", "up", "--backend=vxlam"], 2, "'vxlam' is not one of 'vxlan'"),
        (["lab", "up", "--ipv6", "--dual"], 2, "wincey: use either --ipv6 (IPv6 only) or --dual"),
        (["lab", "up", "--daemon=h2"], 2, "wincey: --daemon 'h2': write it as HOST=COMMAND"),
        (["lab", "up", "--daemon=h7=x"], 2, "wincey: --daemon for 'h7': hosts are h1 to h3"),
        (["lab", "up", "--config={"], 1, "wincey: network config"),
        (["lab", "up", "--config={}"], 1, "wincey: network config: Network is missing"),
        (["lab", "up", "--name=A"], 2, "wincey: lab name 'A'"),
        (["lab", "--directory=/nonexistent", "status"], 1, "wincey: no lab is up: make one with wincey lab up"),
        (["lab", "--directory=/nonexistent", "down", "--name=x"], 2, "wincey: no lab 'x': none is up"),
        (["lab", "--directory=/nonexistent", "down", "--name=x", "--all"], 2, "wincey: use either --name or --all"),
        pytest.param(["lab", "--directory=/proc/none", "up"], 1, "/proc/none", marks=needs_root),
        (["config", "get", "--store=nonsense:/x"], 2, "nonsense"),
    ],
)
def test_mistakes_are_explained_without_a_traceback(words, code, message):
    done = wincey(*words)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == code


def test_without_root_it_says_so():
    # Not by becoming somebody else, who might not be able to read the program.
    code = (
        "import os; os.geteuid = lambda: 1000\n"
        "from wincey.cli import wincey; import sys; sys.argv = ['wincey', 'lab', 'run']; wincey.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr == "wincey: a lab makes network namespaces, which needs root: run the command with sudo\n"


def test_missing_programs_are_named_with_their_packages(monkeypatch):
    monkeypatch.setattr(needs.os, "geteuid", lambda: 0)
    monkeypatch.setattr(
        needs.shutil, "which", lambda program: None if program in {"etcd", "ping"} else f"/bin/{program}"
    )
    needs_etcd = LabSpec(name="x", config=network_config("vxlan"), store="etcd3")
    with pytest.raises(LabError, match=r"needs ping, etcd: install it.*apt-get install iputils-ping etcd-server"):
        needs.check_needs(needs_etcd)


def test_config_goes_into_the_store_and_comes_back(tmp_path):
    store = f"--store=sqlite:{tmp_path}/net.db"
    empty = wincey("config", "get", store)
    assert empty.returncode == 1
    assert "there is no /coreos.com/network/config" in empty.stderr
    for text in (CONFIG, CONFIG.replace("10.3", "10.4")):
        put = wincey("config", "set", store, "-", stdin=text)
        assert (put.returncode, put.stdout) == (0, "put into /coreos.com/network/config\n"), put.stderr
        assert wincey("config", "get", store).stdout == text + "\n"
    (tmp_path / "net.json").write_text(CONFIG)
    assert wincey("config", "set", store, "--etcd-prefix=/other", f"{tmp_path}/net.json").returncode == 0
    assert wincey("config", "get", store, "--etcd-prefix=/other").stdout == CONFIG + "\n"


def test_a_wrong_config_is_refused_and_the_old_one_stays(tmp_path):
    store = f"--store=sqlite:{tmp_path}/net.db"
    wincey("config", "set", store, "-", stdin=CONFIG)
    wrong = wincey("config", "set", store, "-", stdin='{"Network": "10.3.0.0/30"}')
    assert wrong.returncode == 1
    assert "Network" in wrong.stderr
    assert wincey("config", "get", store).stdout == CONFIG + "\n"
    odd = wincey("config", "set", store, "-", stdin=CONFIG.replace('"Backend"', '"Netwrk": 1, "Backend"'))
    assert odd.returncode == 0
    assert "Netwrk" in odd.stderr


@pytest.mark.etcd
@pytest.mark.parametrize("api", ["v2", "v3"])
def test_config_in_etcd_is_what_etcdctl_shows(own_etcd, api):
    words = ["--store", own_etcd.url, f"--etcd-api={api}"]
    assert wincey("config", "set", *words, "-", stdin=CONFIG).returncode == 0
    assert wincey("config", "get", *words).stdout == CONFIG + "\n"
    shown = subprocess.run(
        ["etcdctl", "--endpoints", own_etcd.url, "get", "/coreos.com/network/config"],
        env={**os.environ, "ETCDCTL_API": api[1]},
        capture_output=True,
        text=True,
        check=True,
    )
    assert CONFIG in shown.stdout
