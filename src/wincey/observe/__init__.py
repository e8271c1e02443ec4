"""What people and machines see of a running daemon: its log and its health."""
