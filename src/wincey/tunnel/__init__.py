"""The userspace udp tunnel: the data path of the `udp` backend (compatibility reference, section 6.1).

The raw inner IPv4 packet is the payload of a UDP datagram, and nothing else: flannel's own proxy may be at the other end.

The packets pass through a process of its own, the keeper, which holds the TUN device and the UDP socket. The daemon starts
it, tells it its peers over a unix socket, and may come and go: the keeper goes on. It ends when it is told to, or when its
device is deleted. The keeper has to stay small, so what it runs is the standard library alone:

    __main__  starts a keeper: makes the device, or takes over a running keeper's, then detaches
    keeper    the process: one epoll loop over device, socket and control connections
    engines   which engine moves the packets, and why no better one
    relay     the plain engine, one packet in one system call, and what engines share
    offload   the offload engine in Python: large packets on the device, trains of datagrams on the socket
    native    the same by the compiled core (core/, in C), where the package has it
    large     large packets cut and made, as pure functions
    table     which peer an inner address belongs to: longest prefix
    sources   which inner sources may come from a peer
    packet    header checks and the ICMP error, as pure functions
    device    TUN, UDP and raw sockets
    control   frames on the control socket, read and written by both sides

The daemon's side is `driver` (observe and apply) on top of `client` (one connection to one keeper).
"""
