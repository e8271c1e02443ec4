"""`wincey install-cni`: what it writes, how, and what it refuses."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from wincey.cli import install_cni as module
from wincey.cli.install_cni import DEFAULT_CONFLIST, DEFAULT_NAME, install_cni, plugin_script

EXAMPLES = Path(__file__).parents[2] / "examples" / "cni"


def run(tmp_path, *arguments):
    directories = ["--bin-dir", str(tmp_path / "bin"), "--conf-dir", str(tmp_path / "net.d")]
    return CliRunner().invoke(install_cni, [*directories, *arguments])


def version(program):
    environment = {"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]}
    done = subprocess.run([program], env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)
    return json.loads(done.stdout)["cniVersion"]


def test_plugin_and_conflist(tmp_path):
    result = run(tmp_path)
    assert result.exit_code == 0, result.output
    assert version(tmp_path / "bin" / "flannel") == "1.1.0"
    assert (tmp_path / "net.d" / DEFAULT_NAME).read_text() == DEFAULT_CONFLIST
    assert f"{tmp_path}/bin has no bridge and no host-local" in result.output
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["10-flannel.conflist", "bin", "flannel", "net.d"]


def test_a_conflist_that_is_there_is_kept(tmp_path):
    target = tmp_path / "net.d" / DEFAULT_NAME
    target.parent.mkdir()
    target.write_text("mine")
    assert f"kept {target}" in run(tmp_path).output
    assert target.read_text() == "mine"


@pytest.mark.parametrize("example", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_examples_can_be_installed(tmp_path, example):
    assert run(tmp_path, "--conflist", str(example)).exit_code == 0
    assert (tmp_path / "net.d" / example.name).read_text() == example.read_text()
    if example.name == DEFAULT_NAME:
        assert example.read_text() == DEFAULT_CONFLIST


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not JSON"),
        ('{"type": "flannel"}', "is no network config"),
        ('{"type": "flannel", "name": "x"}', "a single one .conf"),
        ('{"name": "x", "plugins": [{"type": "bridge"}]}', 'none of its plugins is of "type": "flannel"'),
    ],
)
def test_refused_before_anything_is_written(tmp_path, text, words):
    (tmp_path / "my.conflist").write_text(text)
    result = run(tmp_path, "--conflist", str(tmp_path / "my.conflist"))
    assert words in str(result.exception)
    assert not (tmp_path / "bin").exists()


def test_written_beside_and_renamed(tmp_path, monkeypatch):
    """containerd does not see a file that is renamed into the directory from another one."""
    renames = []

    def replace(source, target):
        renames.append((Path(source), Path(target)))
        os.rename(source, target)

    monkeypatch.setattr(module.os, "replace", replace)
    run(tmp_path)
    assert [target.name for _, target in renames] == ["flannel", DEFAULT_NAME]
    for source, target in renames:
        assert source.parent == target.parent
        assert source.name.startswith(".")
        assert source.suffix not in {".conf", ".conflist", ".json"}


def test_a_directory_that_can_not_be_written(tmp_path):
    (tmp_path / "bin").write_text("a file")
    assert "can't be written" in str(run(tmp_path).exception)


def test_a_python_with_a_long_or_blank_path(tmp_path, monkeypatch):
    """The kernel cuts such a first line."""
    directory = tmp_path / ("with blank " + "x" * 120)
    directory.mkdir()
    python = directory / "python"
    python.symlink_to(os.path.realpath(module.sys.executable))
    monkeypatch.setattr(module.sys, "executable", str(python))
    script = tmp_path / "flannel"
    script.write_text(plugin_script())
    script.chmod(0o755)
    assert script.read_text().startswith("#!/bin/sh\n")
    assert version(script) == "1.1.0"
