"""The targets. Importing this registers all of them."""

from fuzz.targets import clients, clouds, commands, kernel, programs, servers, tunnel, values

__all__ = ["clients", "clouds", "commands", "kernel", "programs", "servers", "tunnel", "values"]
