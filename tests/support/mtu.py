"""Whether containers of a lab have the MTU that their network carries."""

from __future__ import annotations

import json
import re

from support.traffic import ping


def mtu_is_right(source, target, family):
    """A packet of the device's MTU with DF set passes; one byte more is answered with the MTU that fits."""
    links = json.loads(source.host.exec(["ip", "-j", "link", "show"]).stdout)
    ours = [link["mtu"] for link in links if link["ifname"] == ("flannel-v6.1" if family == 6 else "flannel.1")]
    mtu = min([source.host.mtu, *ours])
    size = mtu - (28 if family == 4 else 48)
    address = target.address(family)
    code, output = ping(source, address, "-M", "do", "-s", str(size))
    assert code == 0, output
    # A container whose own MTU is larger learns from its host what fits.
    source.exec(["ip", "link", "set", "eth0", "mtu", str(mtu + 100)], check=True)
    source.host.exec(["ip", "link", "set", "cni0", "mtu", str(mtu + 100)])
    ports = json.loads(source.host.exec(["ip", "-j", "link", "show", "master", "cni0"]).stdout)
    for port in ports:
        source.host.exec(["ip", "link", "set", port["ifname"], "mtu", str(mtu + 100)], check=True)
    code, output = ping(source, address, "-M", "do", "-s", str(size + 50))
    assert code != 0
    # From the host; or from the container's own stack, which has learned it from the host before.
    assert re.search(
        rf"(Frag needed and DF set \(mtu = |Packet too big: mtu=|message too long, mtu[:=] ?){mtu}\b", output
    ), output
