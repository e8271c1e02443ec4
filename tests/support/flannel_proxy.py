"""The proxy of flannel's udp backend, from the compatibility reference, section 6.1: the other end in interop tests.

One packet per system call; a list of routes, first match, moved to the front; TTL less one in each direction with the
checksum patched; a packet whose TTL ends is dropped, one without a route answered with "network unreachable", written into
the device. The device goes with the process.

`flannel_proxy.py DEVICE LOCAL PORT SUBNET=HOST...` forwards for ever. With `-` in place of the routes it prints the device's
name, waits for a line on its standard input, binds the socket, and then takes `set SUBNET HOST` and `delete SUBNET` there;
the end of its input is its own.
"""

import fcntl
import ipaddress
import os
import select
import socket
import struct
import sys

BUFFER = 1472


def decremented(packet):
    packet = bytearray(packet)
    packet[8] = (packet[8] - 1) & 0xFF
    total = struct.unpack_from("!H", packet, 10)[0] + 0x100
    struct.pack_into("!H", packet, 10, (total + (total >> 16)) & 0xFFFF)
    return packet if packet[8] else None


def checksum(data):
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def unreachable(packet, source):
    """ICMP 3/0 for a packet, None where flannel sends none."""
    header = (packet[0] & 15) * 4
    if packet[9] == 1 or header >= 60 or struct.unpack_from("!H", packet, 6)[0] & 0x1FFF:
        return None
    quoted = packet[: header + 8].ljust(header + 8, b"\0")
    icmp = bytearray(struct.pack("!BBHI", 3, 0, 0, 0) + quoted)
    struct.pack_into("!H", icmp, 2, checksum(icmp))
    ip = bytearray(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(icmp), 0, 0, 8, 1, 0, source, packet[12:16]))
    struct.pack_into("!H", ip, 10, checksum(ip))
    return bytes(ip + icmp)


class Proxy:
    def __init__(self, device):
        self.tun = os.open("/dev/net/tun", os.O_RDWR)
        answer = fcntl.ioctl(self.tun, 0x400454CA, struct.pack("16sH22x", device.encode(), 0x1001))
        self.device = answer[:16].rstrip(b"\0").decode()
        self.peers = []

    def bind(self, local, port):
        self.port = port
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind((local, port))

    def set(self, subnet, host):
        self.delete(subnet)
        self.peers.append((ipaddress.ip_network(subnet), host))

    def delete(self, subnet):
        self.peers = [peer for peer in self.peers if peer[0] != ipaddress.ip_network(subnet)]

    def run(self, commands):
        inputs = [self.tun, self.udp, *([sys.stdin] if commands else [])]
        while True:
            for ready in select.select(inputs, [], [])[0]:
                if ready is self.udp:
                    self.inbound()
                elif ready == self.tun:
                    self.outbound()
                else:
                    line = os.read(sys.stdin.fileno(), 1 << 16).decode()
                    if not line:
                        return
                    for words in map(
                        str.split, line.splitlines()
                    ):  # each line is one write into a pipe, so it is whole
                        getattr(self, words[0])(*words[1:])

    def inbound(self):
        packet = self.udp.recv(BUFFER)
        packet = decremented(packet) if len(packet) >= 20 else None
        if packet:
            os.write(self.tun, packet)

    def outbound(self):
        packet = os.read(self.tun, BUFFER)
        if packet[0] >> 4 != 4:
            return
        destination = ipaddress.ip_address(packet[16:20])
        match = next((peer for peer in self.peers if destination in peer[0]), None)
        if match is None:
            if error := unreachable(packet, self.address()):
                os.write(self.tun, error)
            return
        self.peers.remove(match)
        self.peers.insert(0, match)
        if packet := decremented(packet):
            self.udp.sendto(packet, (match[1], self.port))

    def address(self):
        try:
            return fcntl.ioctl(self.udp, 0x8915, struct.pack("16s24x", self.device.encode()))[20:24]
        except OSError:
            return bytes(4)


def main(device, local, port, *routes):
    proxy = Proxy(device)
    commands = routes == ("-",)
    if commands:
        print(proxy.device, flush=True)
        os.read(sys.stdin.fileno(), 1 << 16)
    proxy.bind(local, int(port))
    for route in () if commands else routes:
        proxy.set(*route.split("="))
    print("ready", flush=True)
    proxy.run(commands)


if __name__ == "__main__":
    main(*sys.argv[1:])
