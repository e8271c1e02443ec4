"""What the command line says about the store."""

from __future__ import annotations

from typing import Literal

import msgspec


class RemoteOptions(msgspec.Struct, frozen=True):
    """Servers in place of a store. servers: as parse_servers reads them. token_file: "" for none."""

    servers: tuple[str, ...]
    keyfile: str = ""
    certfile: str = ""
    cafile: str = ""
    token_file: str = ""


class StoreOptions(msgspec.Struct):
    """store: "" or `etcd`, or `sqlite:PATH`; the rest but `remote` is for etcd.

    remote: the servers to ask in its place (open_remote), if any.
    """

    store: str = ""
    api: Literal["auto", "v3", "v2"] = "auto"
    endpoints: list[str] = msgspec.field(default_factory=lambda: ["http://127.0.0.1:4001", "http://127.0.0.1:2379"])
    keyfile: str = ""
    certfile: str = ""
    cafile: str = ""
    username: str = ""
    password: str = ""
    remote: RemoteOptions | None = None

    @property
    def described(self) -> str:
        """Which store, in a few words without secrets."""
        if self.remote:
            return f"through {', '.join(self.remote.servers)}"
        if self.store not in {"", "etcd"}:
            return self.store
        return f"etcd at {', '.join(self.endpoints)}"

    def __repr__(self) -> str:
        return f"StoreOptions(store={self.store!r}, api={self.api!r}, endpoints={self.endpoints!r})"  # no secrets
