"""Which subnet this host has: choose it, take it, hold it, renew it.

`allocate.py` and `timing.py` decide (pure), `claims.py` tells two hosts with one address apart, `holder.py` does the I/O.
"""
