"""Docker's plugin protocol: a network driver and an IPAM driver for `docker network create -d wincey --ipam-driver wincey`.

A docker network is a subnet of the cluster network. Each engine that has the network takes a block of it, as one more
lease in the store: so no two engines give out an address twice, and every flanneld of the cluster routes to the block
whatever its backend (docs/adr/0007-docker-networks-are-leases.md).

    protocol   requests in, answers out; no I/O
    state      what this engine has: pools, networks, endpoints; remembered in a file
    pool       which address is next; pure
    fabric     the container networks that flanneld on this host has joined
    blocks     the blocks of addresses leased from the store
    rules      the nftables table that keeps networks apart, masquerades and publishes ports; pure
    host       bridges and veth pairs
    addresses  the IPAM driver's calls
    driver     the network driver's calls, and all calls together
    daemon     the process
"""
