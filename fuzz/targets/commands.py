"""What is typed and inherited: flags, FLANNELD_* variables, the CNI plugin's environment and standard input."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from types import SimpleNamespace

from fuzz.target import Cut, pieces, target
from wincey.cli.goflags import apply_environment, describe, parse_arguments
from wincey.cli.options import FLAGS
from wincey.cni import main as cni
from wincey.model.errors import UsageError


@target("flags", UsageError, seeds=[pieces(*words) for words in (
    ("--iface=eth0", "-ip-masq", "--etcd-endpoints", "http://127.0.0.1:2379"), ("-v=10", "--healthz-port=0x10"), ("--", "x"),
    ("--iface", "a", "--iface", "b", "--etcd-password=x"), ("--public-ip=1.2.3.4", "--subnet-lease-renew-margin", "60"), ("--hepl",),
)])  # fmt: skip
def flags(data: bytes) -> None:
    """Words, half of them from the environment: values of the right kinds or one line, and no secret in what is told."""
    cut, words = Cut(data), list[str]()
    while cut.left and len(words) < 20:
        words.append(cut.piece().decode("utf-8", "surrogateescape").replace("\0", ""))
    environment = {
        "FLANNELD_" + word.partition("=")[0].strip("-").upper().replace("-", "_"): word.partition("=")[2]
        for word in words[::2]
    }
    parsed = parse_arguments(FLAGS, words)
    apply_environment(FLAGS, parsed, environment)
    for flag in FLAGS:
        value = parsed.values[flag.name]
        assert value == flag.default or isinstance(value, {"s": object, "b": bool, "i": int, "l": tuple}[flag.kind])
    told = describe(FLAGS, parsed)
    for flag in FLAGS:
        if flag.secret and flag.name in parsed.given:
            assert f"--{flag.name}=***" in told


_CONF = '{"name":"n","type":"flannel","cniVersion":"1.0.0"}'
_CALLS = [pieces(command, "c1", "/run/netns/x", "eth0", "/nowhere", conf) for command in ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION") for conf in (
    _CONF, '{"name":"n","cniVersion":"9","dataDir":"/x"}', "[")]  # fmt: skip


@target("cni", seeds=_CALLS)
def cni_plugin(data: bytes) -> None:
    """A runtime's call, in a directory of its own: whatever it is, one JSON object and exit code 0 or 1."""
    cut = Cut(data)
    names = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH")
    environment = {name: cut.piece().decode("utf-8", "surrogateescape").replace("\0", "") for name in names}
    before, out = (sys.stdin, sys.stdout), io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="wincey-fuzz-", dir="/dev/shm") as directory:  # in memory
        text = cut.rest().decode("utf-8", "surrogateescape")
        # Only where it can do no harm: its files are in the directory, and no delegate is found.
        environment["CNI_PATH"] = environment["CNI_PATH"] and f"{directory}/no-plugins"
        text = _fenced(text, directory)
        sys.stdin = SimpleNamespace(buffer=io.BytesIO(text.encode("utf-8", "surrogateescape")))  # type: ignore[assignment]  # as a stream
        sys.stdout = SimpleNamespace(buffer=out)  # type: ignore[assignment]  # likewise
        try:
            code = cni.run(environment)
        finally:
            sys.stdin, sys.stdout = before
        assert sorted(os.listdir(directory)) in ([], ["data"])
    if not environment["CNI_COMMAND"]:
        return
    assert code in {0, 1}
    if out.getvalue():
        answer = json.loads(out.getvalue())
        assert isinstance(answer, dict)
        assert code == 0 or (answer["msg"] and 0 < answer["code"] < 1000)
        assert "Error:" not in answer.get("msg", ""), answer


def _fenced(text: str, directory: str) -> str:
    """The same config with its paths in the directory; what is no object stays as it is."""
    try:
        conf = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(conf, dict):
        return text
    fenced = {key: value for key, value in conf.items() if key.lower() not in {"subnetfile", "datadir"}}
    return json.dumps({**fenced, "subnetFile": f"{directory}/none.env", "dataDir": f"{directory}/data"})
