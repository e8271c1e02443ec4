"""What the runtime asked for: environment variables and standard input in, an answer on standard output, an exit code.

The command line has no arguments; errors are JSON on standard output and exit code 1.
"""

from __future__ import annotations

import os
import sys

from wincey.cni.jsontext import encode
from wincey.cni.protocol import (
    BAD_ENVIRONMENT,
    BAD_NETNS,
    INTERNAL,
    IO_FAILURE,
    VERSIONS,
    CniError,
    check_interface,
    check_version,
    is_name,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

_CONTAINER, _NETNS, _INTERFACE, _PATH = "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"
_REQUIRED = {
    "ADD": (_CONTAINER, _NETNS, _INTERFACE, _PATH),
    "CHECK": (_CONTAINER, _NETNS, _INTERFACE, _PATH),
    "DEL": (_CONTAINER, _INTERFACE, _PATH),
    "GC": (_PATH,),
    "STATUS": (_PATH,),
    "VERSION": (),
}
_OWN_NETNS = "/proc/self/ns/net"


def main() -> None:
    """The plugin; ends with the exit code."""
    code = run(os.environ)
    sys.stderr.flush()
    os._exit(code)  # what Python tidies up at its end takes 2 ms, and nothing of it is open


def run(environment: Mapping[str, str]) -> int:
    """Answer the runtime; the exit code. ADD and CHECK do not return when all is well: the delegate takes our place."""
    if not environment.get("CNI_COMMAND"):
        from wincey import __version__  # noqa: PLC0415  # for people only

        sys.stderr.write(
            f"CNI plugin flannel of wincey {__version__}: a container runtime calls it, with CNI_COMMAND and so on\n"
            f"CNI protocol versions supported: {', '.join(VERSIONS)}\n"
        )
        return 0
    try:
        _answer(environment["CNI_COMMAND"], environment)
    except CniError as error:
        return _complain(error)
    except Exception as error:  # whatever it is, the runtime understands nothing but an answer
        return _complain(CniError(INTERNAL, f"{type(error).__name__}: {error}"))
    return 0


def _answer(command: str, environment: Mapping[str, str]) -> None:
    if command not in _REQUIRED:
        raise CniError(BAD_ENVIRONMENT, f"unknown CNI_COMMAND: {command}", f"there are {', '.join(_REQUIRED)}")
    _check_environment(command, environment)
    if command == "VERSION":
        _print(encode({"cniVersion": VERSIONS[-1], "supportedVersions": list(VERSIONS)}))
        return
    try:
        data = sys.stdin.buffer.read()
    except OSError as error:
        raise CniError(IO_FAILURE, f"error reading from stdin: {error.strerror}") from None
    from wincey.cni import commands  # noqa: PLC0415  # VERSION, which comes before every call of podman, needs none of it
    from wincey.cni.netconf import parse_netconf  # noqa: PLC0415  # likewise

    conf = parse_netconf(data)
    check_version(conf.version, command)
    request = commands.Request(*(environment.get(name, "") for name in (_CONTAINER, _NETNS, _INTERFACE, _PATH)))
    if command == "ADD":
        commands.add(conf, request)
    elif command == "DEL":
        commands.delete(conf, request)
    elif command == "CHECK":
        commands.check(conf, request)
    elif command == "GC":
        from wincey.cni.collect import collect  # noqa: PLC0415  # rare

        collect(conf, request)
    else:
        from wincey.cni.status import check_status  # noqa: PLC0415  # rare

        check_status(conf, request.path)


def _check_environment(command: str, environment: Mapping[str, str]) -> None:
    required = _REQUIRED[command]
    missing = [name for name in required if not environment.get(name)]
    if missing:
        raise CniError(BAD_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    if _CONTAINER in required and not is_name(environment[_CONTAINER]):
        raise CniError(BAD_ENVIRONMENT, "invalid characters in containerID", f"it is {environment[_CONTAINER]!r}")
    if _INTERFACE in required:
        check_interface(environment[_INTERFACE])
        _check_netns(environment)


def _check_netns(environment: Mapping[str, str]) -> None:
    netns = environment.get(_NETNS, "")
    if not netns or environment.get("CNI_NETNS_OVERRIDE", "").upper() in {"TRUE", "1"}:
        return
    try:
        same = os.path.samefile(netns, _OWN_NETNS)
    except OSError:
        return  # the delegate says what is wrong with it; DEL must work when it is gone
    if same:
        raise CniError(BAD_NETNS, "plugin's netns and netns from CNI_NETNS should not be the same", f"it is {netns}")


def _complain(error: CniError) -> int:
    answer = {"code": error.code, "msg": error.message} | ({"details": error.details} if error.details else {})
    _print(encode(answer))
    return 1


def _print(text: bytes) -> None:
    sys.stdout.buffer.write(text + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
