"""Cloud route tables: one reconciling driver for all of them, and each cloud's API as a dialect of it.

Nothing here is imported before a config asks for a cloud's backend (agent.parts).
"""
