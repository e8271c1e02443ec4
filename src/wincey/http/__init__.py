"""HTTP for every part that speaks it: the etcd stores, the Kubernetes API, the server mode, Docker's socket.

`client.py` is a small HTTP/1.1 client over asyncio streams. h11 is the protocol's state machine; what is ours is the part
that it leaves out: connections, deadlines, and telling a request that was never sent from one whose answer was lost.
"""
