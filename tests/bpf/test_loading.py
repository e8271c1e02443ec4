"""The loader: pins, taking over, attachments by link and by filter, what a kernel refuses, and what is left afterwards."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from support.netns import netns
from wincey.bpf import bpffs, probe, program, syscall
from wincey.bpf.attach import Attacher, Attachment, device_index
from wincey.bpf.maps import Map, MapLayout
from wincey.bpf.objects import Objects
from wincey.bpf.program import read_baked
from wincey.bpf.syscall import BpfError

pytestmark = pytest.mark.root

DEVICE = "d.1_x"  # with what bpffs takes badly in names
OUT, IN = Attachment("udp_tun_out", DEVICE, "egress"), Attachment("udp_wire_in", DEVICE, "ingress")
BAKED = read_baked("udp")
CALL, CLOCK, COARSE_CLOCK = 0x85, 5, 160  # linux/bpf.h
ROUTE = struct.pack("=I4s", 24, bytes([10, 1, 2, 0])), struct.pack("=4sI", bytes([192, 0, 2, 1]), 0)


@pytest.fixture
def ns():
    with netns() as made:
        made.ip(f"link add {DEVICE} type bridge")
        made.ip(f"link set {DEVICE} up")
        yield made


@pytest.fixture
def directory(ns, tmp_path):
    found = ns.call(lambda: bpffs.owner_directory("test", tmp_path))
    yield found
    ns.call(lambda: Objects(found, BAKED).remove())
    assert not found.exists()


def programs_at(ns, kind):
    """Numbers of the programs at the device, by the system's own tools: of links by the pins, of filters by tc."""
    return ns.run(f"tc filter show dev {DEVICE} {kind}").count("direct-action")


@pytest.mark.parametrize("tcx", [True, False])
def test_what_is_attached_outlives_us_and_is_found_again(ns, directory, tcx):
    def first():
        with Objects(directory, BAKED, tcx=tcx) as objects:
            objects.open()
            objects.maps["routes"].put(*ROUTE)
            objects.attach([OUT, IN])

    def again():
        with Objects(directory, BAKED, tcx=tcx) as objects:
            objects.open()
            assert not objects.fresh
            assert objects.attached([OUT, IN]) == [OUT, IN]
            assert objects.maps["routes"].items() == dict([ROUTE])
            objects.detach([OUT])
            assert objects.attached([OUT, IN]) == [IN]
            objects.detach_others([])
            assert objects.attached([OUT, IN]) == []

    ns.call(first)
    assert [programs_at(ns, kind) for kind in ("ingress", "egress")] == ([0, 0] if tcx else [1, 1])
    ns.call(again)
    assert [programs_at(ns, kind) for kind in ("ingress", "egress")] == [0, 0]


@pytest.mark.parametrize("tcx", [True, False])
def test_a_device_made_anew_gets_its_program_again(ns, directory, tcx):
    def attach():
        with Objects(directory, BAKED, tcx=tcx) as objects:
            objects.open()
            before = objects.attached([OUT])
            objects.attach([OUT])
            return before, objects.attached([OUT])

    assert ns.call(attach) == ([], [OUT])
    ns.ip(f"link delete {DEVICE}")
    ns.ip(f"link add {DEVICE} type bridge")
    assert ns.call(attach) == ([], [OUT])
    assert ns.call(attach) == ([OUT], [OUT])


def test_another_program_of_the_same_name_takes_over_what_the_first_one_knows(ns, directory):
    """An upgrade: maps of one layout go on with all that is in them, others are new, and what is old goes."""
    layouts = BAKED.maps | {"hosts": msgspec.structs.replace(BAKED.maps["hosts"], entries=99)}
    later = msgspec.structs.replace(BAKED, maps=layouts)

    def upgrade():
        with Objects(directory, BAKED) as objects:
            objects.open()
            objects.maps["routes"].put(*ROUTE)
            objects.maps["hosts"].put(bytes(4), bytes(4))
            objects.attach([OUT])
        with Objects(directory, later) as objects:
            objects.open()
            assert objects.fresh == {"hosts"}
            assert objects.maps["routes"].items() == dict([ROUTE])
            assert objects.maps["hosts"].items() == {}
            assert objects.attached([OUT]) == []  # the former one still runs
            assert len(list(directory.glob("link_*"))) == 1
            objects.attach([OUT])
            objects.retire()
            assert objects.attached([OUT]) == [OUT]
        return [path.name for path in directory.iterdir() if path.is_dir()]

    assert ns.call(upgrade) == [later.digest]


def test_a_filter_gives_way_to_a_link_once_the_kernel_can(ns, directory):
    def both():
        with Objects(directory, BAKED, tcx=False) as objects:
            objects.open()
            objects.attach([OUT])
        with Objects(directory, BAKED) as objects:
            objects.open()
            Attacher(directory).attach(OUT, objects.programs["udp_tun_out"])
            assert objects.attached([OUT]) == [OUT]

    ns.call(both)
    assert programs_at(ns, "egress") == 0
    assert [path.name for path in directory.glob("filter_*")] == []


def test_two_owners_of_one_program_at_one_device_do_not_meet(ns, directory, tmp_path):
    other = ns.call(lambda: bpffs.owner_directory("test", tmp_path / "other"))

    def both():
        for place in (directory, other):
            with Objects(place, BAKED, tcx=False) as objects:
                objects.open()
                objects.attach([OUT])
        Objects(other, BAKED).remove()

    ns.call(both)
    assert programs_at(ns, "egress") == 1


def test_a_partly_made_set_is_completed(ns, directory):
    def complete():
        with Objects(directory, BAKED) as objects:
            objects.open()
            objects.attach([OUT])
        generation = directory / BAKED.digest
        (generation / "map_routes").unlink()
        (generation / "prog_udp_cut_in").unlink()
        with Objects(directory, BAKED) as objects:
            objects.open()
            assert objects.fresh == {"routes"}
            assert objects.attached([OUT]) == []  # it runs with a map that nobody can reach any more
            objects.attach([OUT])
            assert objects.attached([OUT]) == [OUT]

    ns.call(complete)


def test_pins_of_vanished_hosts_are_swept(ns, directory, tmp_path):
    def make(place):
        with Objects(place, BAKED) as objects:
            objects.open()
            objects.attach([OUT])

    with netns() as gone:
        gone.ip(f"link add {DEVICE} type bridge")
        left = gone.call(lambda: bpffs.owner_directory("test", tmp_path))
        gone.call(lambda: make(left))
    ns.call(lambda: make(directory))
    for _ in range(100):  # the kernel takes a namespace apart in its own time
        bpffs.sweep()
        if not left.exists():
            break
        subprocess.run(["sleep", "0.1"], check=True)
    assert not left.exists()
    assert ns.call(lambda: len(list(directory.glob("link_*")))) == 1


def test_pins_that_somebody_removed_are_put_back_with_all_that_is_known(ns, directory):
    """As when two releases run at once, and each retires the other."""

    def again():
        with Objects(directory, BAKED) as objects:
            objects.open()
            objects.maps["routes"].put(*ROUTE)
            objects.attach([OUT])
            bpffs.remove(directory / BAKED.digest)
            objects.open()
            objects.attach([OUT])
        with Objects(directory, BAKED) as objects:
            objects.open()
            assert not objects.fresh
            assert objects.attached([OUT]) == [OUT]
            return objects.maps["routes"].items()

    assert ns.call(again) == dict([ROUTE])


def test_who_changes_pins_is_alone(directory):
    code = "import sys, pathlib; from wincey.bpf.bpffs import alone\nwith alone(pathlib.Path(sys.argv[1])): print('in')"
    with bpffs.alone(directory):
        other = subprocess.Popen([sys.executable, "-c", code, str(directory)], stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            other.communicate(timeout=1)
    assert other.communicate(timeout=10)[0] == "in\n"


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize(
    "layout",
    [MapLayout(syscall.LPM_TRIE, 8, 8, 20000, 1), MapLayout(syscall.HASH, 4, 8, 20000)],
    ids=["trie", "hash"],
)
def test_maps_are_made_equal(layout, batch, monkeypatch):
    def key(number):
        address = struct.pack("!I", 0x0A000000 + number * 256)
        return struct.pack("=I", 24) + address if layout.key == 8 else address

    if not batch:

        def none(*_):
            raise BpfError("no batches", errno.EINVAL)

        monkeypatch.setattr(syscall, "map_update_batch", none)
        monkeypatch.setattr(syscall, "map_lookup_batch", none)
    made = Map.create("test", layout)
    try:
        first = {key(number): struct.pack("=Q", number) for number in range(9000)}
        made.make_equal(first)
        assert made.items() == first
        second = {key(number): struct.pack("=Q", number % 7) for number in range(100, 5000)}
        made.make_equal(second)
        assert made.items() == second
        made.delete(key(1))  # not there
        assert made.get(key(100)) == struct.pack("=Q", 100 % 7)
        assert made.get(key(1)) is None
        made.make_equal({})
        assert made.items() == {}
    finally:
        made.close()


def test_counters_are_summed_over_processors():
    made = Map.create("test", MapLayout(syscall.PERCPU_ARRAY, 4, 8, 2))
    try:
        assert made.total(1) == 0
    finally:
        made.close()


def test_the_verifier_is_quoted():
    with pytest.raises(BpfError, match=r"BPF program wrong: .*R0 !read_ok") as told:
        syscall.prog_load(syscall.SCHED_CLS, struct.pack("=BBhi", 0x95, 0, 0, 0), "wrong", "GPL")
    assert "\n" not in str(told.value)
    assert told.value.errno in (errno.EACCES, errno.EINVAL)


@pytest.mark.parametrize("name", ["fastpath", "udp"])
def test_older_kernels_get_a_helper_that_they_have(monkeypatch, name):
    """The clock that costs nothing is of 5.11; the programs are as good with the other one."""
    baked = read_baked(name)
    calls = {
        struct.unpack_from("=BBhi", program.suited(each.code, (5, 10)), at)[3]
        for each in baked.programs.values()
        for at in range(0, len(each.code), 8)
        if each.code[at] == CALL
    }
    assert CLOCK in calls
    assert COARSE_CLOCK not in calls
    assert all(program.suited(each.code, (5, 11)) == each.code for each in baked.programs.values())
    monkeypatch.setattr(program, "kernel_release", lambda: (5, 10))
    maps = {each: Map.create(each, layout) for each, layout in baked.maps.items()}
    try:
        program.close(program.load(baked, maps))
    finally:
        for each in maps.values():
            each.close()


def test_programs_of_another_device_say_what_is_missing(ns, directory):
    def attach():
        with Objects(directory, BAKED) as objects:
            objects.open()
            objects.attach([Attachment("udp_tun_out", "nothere", "egress")])

    with pytest.raises(BpfError, match="attach udp_tun_out to nothere: No such device"):
        ns.call(attach)


def test_the_probe_says_yes_here():
    assert probe.ask(BAKED, (6, 18)) == probe.Answer()


def test_the_probe_says_what_is_missing(monkeypatch, tmp_path):
    assert "Linux 5.4 is too old: the programs need 5.10" in probe.ask(BAKED, (5, 4)).reason
    assert "no bpffs at" in probe.ask(BAKED, (6, 18), mount=tmp_path / "none").reason
    monkeypatch.setattr("sys.byteorder", "big")
    assert "big-endian" in probe.ask(BAKED, (6, 18)).reason
    monkeypatch.setattr("sys.byteorder", "little")
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    assert "pdp11" in probe.ask(BAKED, (6, 18)).reason


@pytest.mark.parametrize(
    ("kept", "reason"),
    [
        # flannel's DaemonSet
        (["CAP_NET_ADMIN", "CAP_NET_RAW"], "this process lacks the capabilities CAP_BPF and CAP_PERFMON"),
        (["CAP_BPF", "CAP_PERFMON"], "this process lacks the capability CAP_NET_ADMIN"),
        (["CAP_BPF", "CAP_PERFMON", "CAP_NET_ADMIN"], ""),
    ],
)
def test_capabilities_decide(kept, reason):
    numbers = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_PERFMON": 38, "CAP_BPF": 39}
    mask = sum(1 << numbers[name] for name in kept)
    told = in_a_child(mask, lambda: (probe.missing_capabilities((6, 18)), loads()))
    assert told[0] == reason
    assert (told[1] == "") is (reason == "")


def loads():
    """ "" if the programs load, else why not: what the kernel itself says of the capabilities."""
    try:
        probe.try_load(BAKED)
    except BpfError as error:
        return str(error)
    if "CAP_NET_ADMIN" in probe.missing_capabilities((6, 18)):
        return "CAP_BPF is not enough to attach"
    return ""


def in_a_child(mask, function):
    """Call a function in a process that has the capabilities of `mask` alone."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            header = struct.pack("=Ii", 0x20080522, 0)
            low, high = mask & 0xFFFFFFFF, mask >> 32
            assert libc.capset(header, struct.pack("=6I", low, low, 0, high, high, 0)) == 0
            answer = function()
        except BaseException as error:
            answer = (repr(error), repr(error))
        os.write(writer, msgspec.json.encode(answer))
        os._exit(0)
    os.close(writer)
    try:
        return msgspec.json.decode(os.read(reader, 1 << 16))
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def test_names_of_devices_are_told_apart():
    names = ["flannel.1", "flannel_1", "flannel%2e1", "flannel1"]
    assert len({bpffs.encoded(name) for name in names}) == len(names)
    assert [bpffs.decoded(bpffs.encoded(name)) for name in names] == names
    assert not any(set("._") & set(bpffs.encoded(name)) for name in names)


def test_an_owner_is_of_its_namespace_and_its_network(ns, tmp_path):
    places = {
        bpffs.owner_directory("test", tmp_path),
        bpffs.owner_directory("test", tmp_path / "b"),
        bpffs.owner_directory("other", tmp_path),
        ns.call(lambda: bpffs.owner_directory("test", tmp_path)),
    }
    assert len(places) == 4
    assert all(place.parent == Path("/sys/fs/bpf/wincey") for place in places)


def test_the_device_is_one_of_this_namespace(ns):
    assert ns.call(lambda: device_index(DEVICE)) == ns.call(lambda: socket.if_nametoindex(DEVICE))
    assert device_index("nothere") == 0
