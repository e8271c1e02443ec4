"""JSON without the `json` module, which imports `re` and `enum`: 6 ms, as long as Python itself takes to start.

Reading is done by the parser that `json` uses too. Where a Python has another one, `json` itself does. Writing is as Go
writes a map: keys in order, no blanks, `<`, `>` and `&` escaped. So the files are byte for byte those of flannel.
"""

from __future__ import annotations

try:
    import _json
except ImportError:  # another Python than CPython
    _json = None  # type: ignore[assignment]  # a module or none

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BLANKS = " \t\r\n"
_FOR_HTML = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
"""What Go escapes besides, wherever it stands; none of these is a part of JSON outside of strings."""


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


class _Context:
    """What the parser wants to know; see json.decoder.JSONDecoder."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    array_hook = None
    parse_float = float
    parse_int = int
    parse_constant = staticmethod(_refuse)


def decode(data: bytes) -> Any:
    """The value that a JSON text stands for; raises ValueError."""
    text = data.decode().strip(_BLANKS)
    try:
        if _json is None:
            return _decode_by_json(text)
        value, end = _json.make_scanner(_Context)(text, 0)  # type: ignore[arg-type]  # these attributes are all it wants
    except (StopIteration, SystemError):
        # The parser leaves its exceptions to json.decoder, and without it says no more than that something is wrong.
        return _decode_by_json(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if end != len(text):
        raise ValueError(f"more text after its end, at character {end}")
    return value


def _decode_by_json(text: str) -> Any:
    import json  # noqa: PLC0415  # not unless it is needed, see above

    return json.loads(text, parse_constant=_refuse)


def encode(value: Any) -> bytes:
    """A value as JSON text, as Go writes it."""
    text = _encode(value)
    for character, escape in _FOR_HTML.items():
        if character in text:
            text = text.replace(character, escape)
    try:
        return text.encode()
    except (
        UnicodeEncodeError
    ):  # half of a surrogate pair, or bytes of the environment that are no UTF-8; Go does the same
        return "".join("\ufffd" if "\ud800" <= each <= "\udfff" else each for each in text).encode()


def _encode(value: Any) -> str:
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{_string(key)}:{_encode(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_encode, value)) + "]"
    if value is None or value is True or value is False:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e21:
        return str(int(value))  # Go has one kind of number: 1e3 and 1000.0 are 1000
    return repr(value)


def _string(text: str) -> str:
    if _json is None:
        import json  # noqa: PLC0415  # see above

        return json.dumps(text, ensure_ascii=False)
    return str(_json.encode_basestring(text))
