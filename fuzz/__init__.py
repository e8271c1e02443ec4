"""Fuzzing of everything that comes from outside; docs/fuzzing.md tells how it is run and what counts as a find."""
