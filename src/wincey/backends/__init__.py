"""How packets get from host to host: one small pure module for each way. `catalogue.py` knows them all.

A backend says what its host publishes (`attrs`), what must exist on the host by itself (`local`) and what for each peer
(`peer`). It does no I/O: everything it may know of the host is a `HostFacts`.
"""
