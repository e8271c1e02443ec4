"""The architecture: who may import whom (contracts in pyproject.toml), and what the daemon loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "src" / "wincey"


def test_contracts_are_kept() -> None:
    # In a process of its own, as it sets up logging in a way that other tests would see.
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_backends_take_only_the_names_of_families_from_socket() -> None:
    used = set()
    for path in (SOURCES / "backends").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "socket":
                used.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and node.module == "socket":
                used.update(name.name for name in node.names)
    assert used <= {"AF_INET", "AF_INET6"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        (
            "wincey.cli.flanneld",
            {"asyncio", "logging", "h11", "ssl", "subprocess", "wincey.agent"},
        ),  # all that --help needs
        ("wincey.agent.daemon", {"h11", "http.client", "urllib.request", "email", "xml", "sqlite3"}),
        (
            "wincey.cni.main",
            {"json", "msgspec", "asyncio", "socket", "subprocess", "wincey.cni.commands", "wincey.model"},
        ),
        (
            "wincey.cni.commands",
            {"json", "msgspec", "asyncio", "socket", "subprocess", "wincey.cni.collect", "wincey.model"},
        ),
        ("wincey.agent.serving", {"wincey.kernel", "wincey.tunnel", "wincey.backends", "sqlite3"}),
        ("wincey.tunnel.__main__", {"asyncio", "msgspec", "h11", "ssl", "wincey.agent", "wincey.store"}),
    ],
)
def test_what_is_loaded_stays_small(module: str, unwanted: set[str]) -> None:
    """Each of these costs memory for as long as the process runs, or time at each start."""
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert module in loaded
    assert not (unwanted | {"click", "rich", "pyroute2", "aiohttp"}) & set(loaded)
