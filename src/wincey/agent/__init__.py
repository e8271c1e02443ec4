"""One network's life on a host: join, hold, leave, and the daemon around it.

`planner.py` turns config and leases into objects, `desired.py` keeps them and knows what changed, `reconciler.py` makes the
host so, `network.py` is the life itself, `daemon.py` the process.
"""
