"""What the backends on Tencent Cloud and Alibaba Cloud have in common: an access key in the config, or in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from wincey.backends.base import HostFacts
from wincey.backends.cloud import TABLES, CloudBackend, named_tables
from wincey.model.config import NetworkConfig
from wincey.model.errors import BadConfig
from wincey.model.remote_api import CLOUD_KEYS


class KeyedBackend(CloudBackend):
    """Keys: `AccessKeyID` and `AccessKeySecret`, both or none; `RouteTableID`, one or a list, where it is not the usual table.

    example: a route table's id.
    """

    keys: ClassVar[tuple[str, ...]] = (*CLOUD_KEYS, TABLES)
    example: ClassVar[str]

    def __init__(self, config: NetworkConfig, host: HostFacts) -> None:
        super().__init__(config, host)
        self._tables = named_tables(config, self.example)
        found = {key: config.backend.raw(key) for key in CLOUD_KEYS}
        for key, value in found.items():
            if not isinstance(value, str | None):  # said without the value, which may be the secret
                raise BadConfig(f'network config: Backend.{key} is no text; write it in quotes: "{key}": "..."')
        self._secrets = {key: value for key, value in found.items() if value}
        if len(self._secrets) == 1:
            lacking = next(key for key in CLOUD_KEYS if key not in self._secrets)
            raise BadConfig(
                f"network config: Backend.{lacking} is missing: give both {' and '.join(CLOUD_KEYS)}, or none of them and put"
                " ACCESS_KEY_ID and ACCESS_KEY_SECRET into the daemon's environment"
            )

    def tables(self) -> tuple[str, ...]:
        return self._tables

    def secrets(self) -> Mapping[str, str]:
        return self._secrets
