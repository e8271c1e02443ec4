"""Open the store that the command line names; nothing but the chosen one is imported."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from wincey.model.errors import UsageError
from wincey.store.kv import KeyValueStore
from wincey.store.options import RemoteOptions, StoreOptions

__all__ = ["RemoteOptions", "StoreOptions", "open_remote", "open_store"]

if TYPE_CHECKING:
    from wincey.store.remote import RemoteRegistry
    from wincey.store.remotelist import RemoteNetworkList
    from wincey.store.servers import Servers


async def open_store(options: StoreOptions, prefix: str) -> KeyValueStore:
    """The store to keep the network under `prefix` in; raises UsageError, StoreUnavailable, StoreDenied.

    With api `auto` the choice stands as soon as there is any key below the prefix. While there is none (the store's answer
    for the config is None) whoever waits for the config closes the store and calls this again each second, so that a config
    put later through either API is found.
    """
    kind, _, path = options.store.partition(":")
    if kind == "sqlite" and path:
        from wincey.store.sqlite import SqliteStore  # noqa: PLC0415  # only the chosen store costs memory

        return SqliteStore(path)
    if options.store not in {"", "etcd"}:
        raise UsageError(f"--store={options.store}: it can be etcd or sqlite:PATH")
    from wincey.store.etcd import open_etcd  # noqa: PLC0415  # as above

    return await open_etcd(options, "/" + prefix.strip("/") + "/")


def open_servers(options: RemoteOptions, host: str) -> Servers:
    """The servers that the command line names. host: see Servers. Raises UsageError, BadOption.

    As with flannel it is TLS when any file for it is given; certificates are judged by the system's roots unless there is
    a cafile.
    """
    from wincey.store.endpoints import tls_context  # noqa: PLC0415  # only what is used costs memory
    from wincey.store.servers import Servers, read_token  # noqa: PLC0415  # likewise

    wants_tls = bool(options.keyfile or options.certfile or options.cafile)
    scheme = "https" if wants_tls else "http"
    urls = [server if "://" in server else f"{scheme}://{server}" for server in options.servers]
    tls = None
    if any(url.startswith("https:") for url in urls):
        tls = tls_context(options.keyfile, options.certfile, options.cafile, flags="--remote")
    token = read_token(options.token_file) if options.token_file else ""
    return Servers(urls, tls, host=host, token=token)


def open_remote(options: RemoteOptions, network: str, host: str) -> RemoteRegistry:
    """A network behind servers. network: `_` for the one without a name. Otherwise as open_servers."""
    from wincey.store.remote import RemoteRegistry  # noqa: PLC0415  # likewise

    return RemoteRegistry(open_servers(options, host), network)


def open_remote_list(options: RemoteOptions, names: Sequence[str], host: str) -> RemoteNetworkList:
    """The networks behind servers; see RemoteNetworkList and open_servers."""
    from wincey.store.remotelist import RemoteNetworkList  # noqa: PLC0415  # likewise

    return RemoteNetworkList(open_servers(options, host), names)
