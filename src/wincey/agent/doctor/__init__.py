"""`wincey doctor`: what is wrong, why, and what to do about it.

Facts are gathered once: from the daemon's local API where one answers, and from the store, the kernel, the packet filters and
the wire in any case, as doctor must work when no daemon runs or it hangs. Pure checks make findings of them (checks, ways,
firewall). Nothing of the host is changed.
"""
