"""Wincey: the container network. Containers on different hosts get addresses of one network and reach each other."""

__version__ = "0.1.0"
