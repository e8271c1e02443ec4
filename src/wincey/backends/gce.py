"""gce: a route in the VPC network of Google Compute Engine for each host (reference, section 6.8)."""

from __future__ import annotations

from typing import ClassVar

from wincey.backends.cloud import CloudBackend


class GceBackend(CloudBackend):
    """Without keys of its own: project, network and instance are what the metadata server says."""

    type: ClassVar[str] = "gce"
