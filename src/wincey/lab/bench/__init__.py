"""Measure the data path. See `variants` for what is compared, `run` for how."""
