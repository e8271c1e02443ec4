"""The command lines: flanneld, with the flags of Go programs, and wincey, the operator's. Argument parsing only."""
