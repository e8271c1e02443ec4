"""Values without I/O: addresses, the network's config, leases and the desired-state vocabulary.

Nothing in here imports anything else of ours; everything else may import this.
"""
