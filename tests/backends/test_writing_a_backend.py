"""The page on writing a backend is right: its code runs here, its tests pass, and hosts of a lab are connected by it."""

import json
import os
import re
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from support.keys import delete, lease_key, wait_until
from wincey.lab.lab import Lab
from wincey.lab.plan import LabSpec

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "writing-a-backend.md"

# Does for the page's modules what their places in the tree would do.
REGISTER = """
import importlib.util
import sys
from pathlib import Path

from wincey.agent import parts
from wincey.backends.catalogue import BACKENDS

def load(name):
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

load("wincey.model.roster")
load("wincey.programs.roster")
BACKENDS["direct"] = load("wincey.backends.direct").DirectBackend
registered = load("wincey.agent.parts_of_the_page")
parts.PARTS += (registered.PART,)
parts.QUESTIONS = {**parts.QUESTIONS, **registered.QUESTION}
"""
DAEMON = "import register\nfrom wincey.cli.flanneld import main\n\nmain()\n"


@pytest.fixture
def code(tmp_path):
    """The page's modules, in files of their names, and a daemon that has them."""
    blocks = dict(re.findall(r"<!-- (\S+\.py) -->\n```python\n(.*?)```\n", PAGE.read_text(), re.DOTALL))
    assert len(blocks) == 5
    for place, text in blocks.items():
        name = place.removeprefix("src/").removesuffix(".py").replace("/", ".")
        # The page adds to that module, rather than being it.
        name = f"{name}_of_the_page" if name == "wincey.agent.parts" else name.rpartition("tests.backends.")[2]
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "register.py").write_text(REGISTER)
    (tmp_path / "daemon.py").write_text(DAEMON)
    (tmp_path / "conftest.py").write_text("import register\n")
    return tmp_path


def run(*arguments, directory):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment["PYTHONPATH"] = str(directory)
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_pages_tests_pass(code):
    out = run("pytest", "-q", "-o", "asyncio_mode=auto", "-p", "no:cacheprovider", "test_direct.py", directory=code)
    assert "3 passed" in out


def test_the_pages_code_is_as_we_write_code(code):
    # What follows from the files lying elsewhere: their names, which imports are ours, a module that is part of another.
    settings = ("--config", str(ROOT / "pyproject.toml"), "--ignore", "N999,I001,D100")
    modules = [path.name for path in code.glob("wincey.*.py")]
    assert len(modules) == 4
    run("ruff", "check", *settings, *modules, directory=code)
    run("ruff", "format", "--check", "--config", str(ROOT / "pyproject.toml"), *modules, directory=code)


@pytest.mark.root
def test_hosts_are_connected_by_the_pages_backend(code):
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    config = json.dumps({"Network": "10.5.0.0/16", "Backend": {"Type": "direct"}})
    daemon = {"*": f"{sys.executable} {code}/daemon.py"}
    with Lab(LabSpec(name=f"page-{secrets.token_hex(3)}", config=config, hosts=3, daemons=daemon)) as lab:
        first, second, third = lab.hosts
        assert lab.ping(patience=5).unreachable == []
        roster = first.directory / "wincey" / "subnet" / "roster"
        wait_until(lambda: len(roster.read_text().splitlines()) == 2)
        third.stop_daemon()
        delete(lab, lease_key(third))
        wait_until(lambda: roster.read_text().split()[::2] == [second.underlay(4)])
        first.kill_daemon()
        roster.write_text("10.99.0.77 stale\n")
        first.start_daemon()
        wait_until(lambda: roster.read_text().split()[::2] == [second.underlay(4)])
        first.stop_daemon()
        first.exec([*first.argv(), "--cleanup"], check=True)
        assert not roster.parent.exists()
        assert "via" not in first.exec(["ip", "route"]).stdout
