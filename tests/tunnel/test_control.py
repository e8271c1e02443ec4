import os
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wincey.tunnel.control import DirectoryAddress, connect, control_name, decode, encode


@given(st.lists(st.tuples(st.dictionaries(st.text(), st.integers() | st.text()), st.binary()), max_size=5), st.data())
def test_frames_survive_any_cutting(frames, data):
    stream = b"".join(encode(*frame) for frame in frames)
    buffer, found = bytearray(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        buffer += stream[:size]
        stream = stream[size:]
        while frame := decode(buffer):
            found.append(frame)
    assert found == frames
    assert not buffer


@given(st.binary(max_size=64))
def test_garbage_is_an_error_or_not_whole(garbage):
    buffer = bytearray(garbage)
    try:
        decode(buffer)
    except ValueError:
        return


@pytest.mark.parametrize("frame", [b"\xff" * 8, encode({})[:8] + b"[]", b"\0\0\0\2\0\0\0\0{!"])
def test_what_is_no_frame_is_refused(frame):
    with pytest.raises(ValueError, match=r".+"):
        decode(bytearray(frame))


def test_a_socket_path_may_be_long(tmp_path):
    directory = tmp_path / ("d" * 100) / ("e" * 100)
    directory.mkdir(parents=True)
    path = str(directory / control_name("flannel0"))
    with socket.socket(socket.AF_UNIX) as listener:
        with DirectoryAddress(path) as address:
            listener.bind(address)
        listener.listen()
        connect(path, blocking=True).close()
    with pytest.raises(ConnectionRefusedError):
        connect(path, blocking=True)
    os.unlink(path)
    with pytest.raises(FileNotFoundError):
        connect(path, blocking=True)
