"""Real agents on a simulated world: an etcd, kernels, networks, clocks and bad days, all from one seed (docs/simulator.md).

`loop.py` is the time, `etcd.py` the store and `wire.py` the way to it, `kernel.py` a host's kernel and `forwarding.py` what
packets do in two of them, `host.py` a machine with an agent. `faults.py` is what can go wrong, `scenario.py` which of it does,
`world.py` one run of it, and `invariants.py` what must hold all the while.
"""
