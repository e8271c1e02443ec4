"""Where the config and the leases live.

`kv.py` is the protocol of a key-value store with revisions, time limits and watches: etcd v3, etcd v2 and an SQLite file
are such stores, and one contract test suite holds them to it. `registry.py` gives keys and values their meaning (config,
leases, host claims), contains bad ones, and is all that leasing and the agent see.
"""
