"""BGP by a routing daemon, BIRD 2 or FRR, whose configuration follows from the leases.

`bird` and `frr` write configurations and read answers, without I/O; `control` speaks to the daemons' sockets; `instance`
starts, changes and ends one daemon; `learned` reads what the kernel was taught, `check` compares that with what was
expected; `driver` puts them together for the reconciler; `question` finds which daemon this host has.
"""
