"""What the product never does: run a text by a shell, run or read code out of data, write where others may put a link."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "wincey"

FORBIDDEN_CALLS = {
    *(
        "eval",
        "exec",
        "compile",
        "__import__",
        "os.system",
        "os.popen",
        "subprocess.getoutput",
        "subprocess.getstatusoutput",
    ),
    *("asyncio.create_subprocess_shell", "tempfile.mktemp", "yaml.load", "ssl._create_unverified_context", "input"),
}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "pty", "commands", "telnetlib", "ftplib"}
SHELLS = {"sh", "bash", "/bin/sh", "/bin/bash"}

ALLOWED_SHELLS = {
    "model/command.py": "the extension backend runs the user's own commands; values reach them in the environment",
    "kernel/wireguard/userspace.py": "a constant script, in a mount namespace of its own; values are its arguments",
}
"""Where a shell is started, and why that is right. The lab is a tool of developers, and not looked at."""


@functools.cache
def modules():
    """Every module of the product, by name, as a tree."""
    return list(_read())


def _read():
    for path in sorted(SOURCE.rglob("*.py")):
        name = str(path.relative_to(SOURCE))
        if not name.startswith("lab/"):
            yield name, ast.parse(path.read_text())


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(name, tree):
    """Each use of what is forbidden, in words."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if dotted(node.func) in FORBIDDEN_CALLS:
                yield f"{name}:{node.lineno}: {dotted(node.func)}"
            for keyword in node.keywords:
                if keyword.arg == "shell" and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{name}:{node.lineno}: shell="
                if (
                    keyword.arg in {"verify", "check_hostname"}
                    and isinstance(keyword.value, ast.Constant)
                    and not keyword.value.value
                ):
                    yield f"{name}:{node.lineno}: {keyword.arg}=False"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from (
                f"{name}:{node.lineno}: {each}" for each in names if each.partition(".")[0] in FORBIDDEN_MODULES
            )
        elif isinstance(node, ast.List | ast.Tuple) and len(node.elts) >= 2:
            first, second = node.elts[:2]
            texts = [each.value for each in (first, second) if isinstance(each, ast.Constant)]
            if len(texts) == 2 and texts[0] in SHELLS and texts[1] == "-c" and name not in ALLOWED_SHELLS:
                yield f"{name}:{node.lineno}: a shell"
        elif isinstance(node, ast.Attribute) and dotted(node) == "ssl.CERT_NONE":
            yield f"{name}:{node.lineno}: {dotted(node)}"


def test_no_shell_no_code_from_data_no_unverified_peer():
    assert [fault for name, tree in modules() for fault in faults(name, tree)] == []


def test_what_is_allowed_is_there():
    assert ALLOWED_SHELLS.keys() <= {name for name, _ in modules()}
    for name in ALLOWED_SHELLS:
        assert '["sh", "-c"' in (SOURCE / name).read_text()


def test_each_would_be_found():
    text = """
import pickle, subprocess, os, ssl
subprocess.run("x", shell=True)
os.system("x")
argv = ["sh", "-c", "x"]
eval("1")
ssl.CERT_NONE
"""
    found = [fault.partition(": ")[2] for fault in faults("x.py", ast.parse(text))]
    assert sorted(found) == sorted(["pickle", "shell=", "os.system", "a shell", "eval", "ssl.CERT_NONE"])
