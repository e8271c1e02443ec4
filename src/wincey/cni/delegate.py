"""The plugin that does the work. ADD and CHECK become it, so that its answer is ours and whoever kills us kills it; DEL waits."""

from __future__ import annotations

import os

from wincey.cni.jsontext import decode, encode
from wincey.cni.protocol import INTERNAL, CniError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

_OWN_STDIN = 0


def find(kind: str, path: str) -> str:
    """The executable of a plugin type on CNI_PATH; raises CniError."""
    if not kind or "/" in kind:
        raise CniError(INTERNAL, f"invalid plugin name: {kind}")
    directories = path.split(":")
    for directory in directories:
        candidate = f"{directory}/{kind}"
        if directory and os.path.isfile(candidate):
            return candidate
    raise CniError(
        INTERNAL,
        f'failed to find plugin "{kind}" in path [{" ".join(directories)}]',
        "install the standard CNI plugins there (Debian: containernetworking-plugins), or name another type in 'delegate'",
    )


def become(program: str, stdin: int, command: str) -> NoReturn:
    """Run the delegate in our place, a file as its standard input; raises CniError when it can't be started."""
    os.dup2(stdin, _OWN_STDIN)
    try:
        os.execve(program, [program], {**os.environ, "CNI_COMMAND": command})  # noqa: S606  # it is to become the delegate
    except OSError as error:
        raise CniError(INTERNAL, f"failed to delegate {command.lower()}: {program}: {error.strerror}") from None


def in_memory(config: dict[str, Any]) -> int:
    """A file descriptor with a config to be read, for `become`."""
    descriptor = os.memfd_create("netconf")
    os.write(descriptor, encode(config))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def run(program: str, config: bytes, environment: dict[str, str]) -> tuple[int, bytes]:
    """Run a delegate to its end; its exit code (negative: a signal) and what it printed. Raises CniError.

    environment: variables that differ from ours.
    """
    # A file, not a pipe: nobody has to feed it while its answer is read.
    stdin = os.memfd_create("netconf")
    os.write(stdin, config)
    os.lseek(stdin, 0, os.SEEK_SET)
    output, its_output = os.pipe()
    try:
        actions = [(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, its_output, 1)]
        try:
            pid = os.posix_spawn(program, [program], {**os.environ, **environment}, file_actions=actions)
        except OSError as error:
            raise CniError(INTERNAL, f"failed to run {program}: {error.strerror}") from None
        os.close(its_output)
        its_output = -1
        chunks = []
        while chunk := os.read(output, 65536):
            chunks.append(chunk)
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status), b"".join(chunks)
    finally:
        for descriptor in (stdin, output, its_output):
            if descriptor >= 0:
                os.close(descriptor)


def failure(program: str, code: int, output: bytes) -> CniError:
    """What a delegate said that ended with a code other than 0."""
    try:
        answer = decode(output)
        return CniError(int(answer["code"]), str(answer["msg"]), str(answer.get("details") or ""))
    except (ValueError, TypeError, KeyError, AttributeError):
        end = f"exit code {code}" if code > 0 else f"signal {-code}"
        return CniError(INTERNAL, f"{program} ended with {end}", output.decode(errors="replace").strip()[:1000])


def supports(program: str, version: str) -> bool:
    """Whether a delegate knows a version of the specification; one that does not answer does not."""
    code, output = run(program, b"{}", {"CNI_COMMAND": "VERSION"})
    try:
        return code == 0 and version in decode(output)["supportedVersions"]
    except (ValueError, TypeError, KeyError):
        return False
