"""The server of the client and server mode: leases over flannel 0.5's HTTP API, for hosts that don't reach the store.

It only passes on: it never joins, and keeps nothing that it could lose, so that several servers may serve one store.
"""
