"""The lab: many hosts on one machine, in network namespaces.

`plan` says what a lab consists of (names, addresses, commands) and does nothing; `namespace`, `process`, `store` and `node`
each do one kind of thing; `lab` puts them together. The demo, the end-to-end tests and the benchmarks all use this package.
"""

from wincey.lab.lab import Lab
from wincey.lab.node import Container, Host, Node
from wincey.lab.plan import LabSpec, network_config

__all__ = ["Container", "Host", "Lab", "LabSpec", "Node", "network_config"]
