"""The user's own commands: run one at a time, shown with what they said, and remembered so that a restart can go on.

running: one command, from start to end. memory: what was added, kept over restarts. start: what runs before the lease.
driver: the reconciler's driver.
"""
