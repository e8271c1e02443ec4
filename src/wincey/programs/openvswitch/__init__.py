"""Open vSwitch: bridges and ports through its database (OVSDB, RFC 7047), flows through `ovs-ofctl` in one bundle.

`jsonrpc` splits the database's stream and reads its values, `replica` is the picture of the tables that a monitor keeps, both
without I/O; `database` is the connection. `edits` composes transactions and `flows` the texts of ovs-ofctl, both pure.
`liveness` notices when ovs-vswitchd, and with it every flow, goes; `driver` puts them together for the reconciler, `host` tells
before joining whether Open vSwitch is there.
"""
