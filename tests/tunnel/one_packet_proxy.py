"""A udp backend as flannel's, written from the compatibility reference, section 6.1: the other end in interop tests.

One packet per system call; a list of routes, first match, moved to the front; TTL less one in each direction with the
checksum patched; a packet whose TTL ends is dropped. `one_packet_proxy.py DEVICE LOCAL PORT SUBNET=HOST...`
"""

import fcntl
import ipaddress
import os
import select
import socket
import struct
import sys


def decremented(packet):
    packet = bytearray(packet)
    packet[8] -= 1
    total = struct.unpack_from("!H", packet, 10)[0] + 0x100
    struct.pack_into("!H", packet, 10, (total + (total >> 16)) & 0xFFFF)
    return packet if packet[8] else None


def main(device, local, port, *routes):
    tun = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", device.encode(), 0x1001))
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((local, int(port)))
    peers = [(ipaddress.ip_network(subnet), host) for subnet, _, host in (route.partition("=") for route in routes)]
    print("ready", flush=True)
    while True:
        for ready in select.select([tun, udp], [], [])[0]:
            if ready is udp:
                packet = decremented(udp.recv(1472))
                if packet:
                    os.write(tun, packet)
                continue
            packet = os.read(tun, 1472)
            if packet[0] >> 4 != 4:
                continue
            destination = ipaddress.ip_address(packet[16:20])
            match = next((peer for peer in peers if destination in peer[0]), None)
            packet = decremented(packet)
            if match and packet:
                peers.remove(match)
                peers.insert(0, match)
                udp.sendto(packet, (match[1], int(port)))


if __name__ == "__main__":
    main(*sys.argv[1:])
