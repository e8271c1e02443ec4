"""IPsec by strongSwan: its daemon charon, which this package starts, configures over vici, and outlives it or is outlived.

vici, client: the protocol, and asyncio around it. charon, launcher: the process. xfrm: the kernel's policies. connections:
what is loaded for a peer. upkeep: sees to it that every connection has its security associations. driver: all of it behind
the reconciler's protocol. host: what has to be known before there is a plan.
"""
