"""The project itself: set-up, the Makefile, the documents, and rules that a reader would otherwise have to watch over."""

from __future__ import annotations

import ipaddress
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.ci_skips import unexpected

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]


def tracked() -> list[Path]:
    """Files that git knows; all that lie around where there is no git, as in an unpacked archive."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("this is no git work tree")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_readme_promises_what_make_fresh_proves() -> None:
    block = re.search(r"<!-- fresh:begin -->\n```sh\n(.*?)```\n<!-- fresh:end -->", README, re.DOTALL)
    assert block, "scripts/fresh.sh reads its commands from between these marks"
    commands = [line.partition("#")[0].strip() for line in block[1].splitlines()]
    assert commands == ["make demo", "make test"]


def test_nothing_is_kept_that_is_ignored() -> None:
    """A compiled core of this machine would be in everybody's clone, and in a package for another one."""
    kept = subprocess.run(
        ["git", "ls-files", "--cached", "--ignored", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert kept.stdout == ""


def test_ci_runs_make_test_and_nothing_more() -> None:
    code = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if not line.startswith("#")]
    assert code == ['cd "$(dirname "$0")/.." && exec make test']


def test_make_help_tells_every_target() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert targets == set(re.findall(r"^make (\w+) +\S", told, re.MULTILINE))
    assert {"setup", "demo", "test", "check", "bench", "fresh", "help", "clean"} <= targets


@pytest.mark.parametrize("program", ["wincey", "flanneld", "mk-docker-opts.sh"])
def test_programs_are_in_the_virtual_environment(program: str) -> None:
    path = Path(sys.executable).parent / program
    assert os.access(path, os.X_OK)


def test_the_installed_script_is_the_one_in_the_tree() -> None:
    """A copy would go stale with the first change, and tests of the installed one would test the past."""
    assert (Path(sys.executable).parent / "mk-docker-opts.sh").resolve() == ROOT / "scripts" / "mk-docker-opts.sh"


def test_setup_that_lacks_programs_says_so_in_one_line(tmp_path: Path) -> None:
    """Without apt-get, as on another system. Only what the script itself needs is on PATH."""
    for name in ("sh", "dirname", "cat", "id", "cksum"):
        found = shutil.which(name)
        assert found
        (tmp_path / name).symlink_to(found)
    done = subprocess.run(
        [ROOT / "scripts" / "setup.sh", "demo"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"setup: missing: .*iputils-ping.*\n", done.stderr), done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_executable_posix_shell(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/bin/sh\n")
    done = subprocess.run(["sh", "-n", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_page_of_flags_is_current() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "flags_doc.py"))
    assert (ROOT / "docs" / "flags.md").read_text() == script["render"](), "run .venv/bin/python scripts/flags_doc.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_modules_that_the_architecture_page_names_exist() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`((?:model|store|leasing|backends|kernel|agent)/\w+\.py)`", page))
    assert named
    assert not [name for name in named if not (ROOT / "src" / "wincey" / name).is_file()]


def test_every_decision_is_in_the_list() -> None:
    index = (ROOT / "docs" / "adr" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs" / "adr").glob("0*.md")}
    assert pages == set(re.findall(r"\]\((\d{4}-[^)]+)\)", index))


def test_every_ignore_has_its_reason_beside_it() -> None:
    """`# noqa: S606  # becomes the command`, and likewise for types."""
    ignore = re.compile(r"#\s*(?:noqa(?::\s*[A-Z0-9, ]+)?|type:\s*ignore(?:\[[\w, -]+\])?)(?P<rest>.*)")
    bare = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix == ".py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if (match := ignore.search(line))
        and "ignore = re" not in line
        and not re.match(r"\s*[#(]?\s*\w+", match["rest"])
    ]
    assert not [place for place in bare if not place.startswith("tests/test_project.py")]


def test_no_host_of_the_outside_world_is_named_unless_listed() -> None:
    """Packages come from wherever a machine's pip and apt are set up to look, so no mirror or registry is named."""
    known = {"github.com", "www.apache.org", "sqlite.org", "www.w3.org"}  # what the text cites; the name of SVG
    known |= {"compute.googleapis.com", "www.googleapis.com", "vpc.tencentcloudapi.com", "metadata.tencentyun.com"}
    known |= {"vpc.aliyuncs.com", "ecs.aliyuncs.com"}  # the APIs of clouds
    strangers = set()
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for host in re.findall(r"https?://(?:[^/\s@]*@)?([A-Za-z0-9][A-Za-z0-9.-]*\.[A-Za-z0-9-]+)", text):
            if host not in known and not _example(host):
                strangers.add(f"{path.relative_to(ROOT)}: {host}")
    assert not strangers


def _example(host: str) -> bool:
    """A number, or a name that is set aside for examples and tests (RFC 2606, RFC 6761)."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return host.rpartition(".")[2] in {"test", "example", "invalid", "localhost"} or host.endswith("example.com")
    return True


class TestSkipsInCi:
    """The plugin, in a pytest of its own."""

    FILE = """
import pytest

def test_passes():
    pass

def test_skips():
    pytest.skip("no such tool")

@pytest.mark.xfail(reason="known")
def test_fails_as_expected():
    assert False
"""

    def run(self, directory: Path, ci: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        (directory / "test_one.py").write_text(self.FILE)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
        environment |= {"CI": ci, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-m", "pytest", "-p", "support.ci_skips", "-p", "no:cacheprovider", "-q", *arguments]
        return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)

    def test_a_skip_fails_the_run(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "true")
        assert done.returncode == 1
        assert "test_one.py::test_skips: no such tool" in done.stdout

    def test_only_in_ci(self, tmp_path: Path) -> None:
        assert self.run(tmp_path, "").returncode == 0

    def test_without_a_skip_nothing_is_said(self, tmp_path: Path) -> None:
        done = self.run(tmp_path, "true", "-k", "not skips")
        assert done.returncode == 0
        assert "skipped in CI" not in done.stdout

    def test_listed_reasons_are_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("support.ci_skips.ALLOWED", {r"kernel \S+ has no ESP": "CI's kernel is what it is"})
        skipped = [("one", "kernel 6.1 has no ESP"), ("two", "no such tool")]
        assert unexpected(skipped) == [("two", "no such tool")]
