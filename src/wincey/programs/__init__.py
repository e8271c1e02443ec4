"""Backends that work through another program on the host: one package each, with its driver.

Nothing here is imported before a config asks for its backend (agent.parts).
"""
