"""Choose between etcd's two APIs, and open a store on it.

With --etcd-api=auto it is the v3 API, unless only v2 holds the network. Hosts of one network must all end up with the same
one, and before anybody has put a config nothing says which: see open_store.
"""

from __future__ import annotations

import logging
import ssl

from wincey.model.errors import StoreDenied
from wincey.store.endpoints import NoSuchApi, tls_context
from wincey.store.etcd2 import Etcd2Store
from wincey.store.etcd3 import Etcd3Store
from wincey.store.kv import KeyValueStore
from wincey.store.options import StoreOptions

log = logging.getLogger("wincey.store")


async def open_etcd(options: StoreOptions, prefix: str) -> KeyValueStore:
    """See open_store. prefix ends in `/`."""
    tls = _tls(options)

    def etcd3() -> Etcd3Store:
        return Etcd3Store(options.endpoints, tls, username=options.username, password=options.password)

    def etcd2() -> Etcd2Store:
        return Etcd2Store(options.endpoints, tls, username=options.username, password=options.password)

    if options.api == "auto":
        return await _find(etcd3(), etcd2(), prefix)
    store: KeyValueStore = etcd2() if options.api == "v2" else etcd3()
    log.info("Using %s, as --etcd-api=%s says", store.name, options.api)
    return store


async def _find(v3: Etcd3Store, v2: Etcd2Store, prefix: str) -> KeyValueStore:
    chosen: KeyValueStore | None = None
    try:
        in_v3 = await _holds(v3, prefix)
        in_v2 = None if in_v3 is True else await _holds(v2, prefix)
        if in_v3 is True:
            chosen, reason = v3, f"it holds {prefix}"
        elif in_v2 is True:
            chosen, reason = v2, f"it holds {prefix}, and v3 does not"
        elif isinstance(in_v3, StoreDenied):
            raise in_v3
        elif in_v3 is False or in_v2 is None:
            chosen, reason = v3, f"there is nothing below {prefix} yet"
        elif isinstance(in_v2, StoreDenied):
            raise in_v2
        else:
            chosen, reason = v2, "it has no v3 API"
    finally:
        for store in (v3, v2):
            if store is not chosen:
                await store.close()
    # While nobody has put a config, this is called again each second.
    log.log(logging.INFO if True in {in_v3, in_v2} else logging.DEBUG, "Using %s: %s", chosen.name, reason)
    return chosen


async def _holds(store: Etcd2Store | Etcd3Store, prefix: str) -> bool | StoreDenied | None:
    """Whether the store has keys below the prefix; None when the servers lack its API."""
    try:
        return await store.holds(prefix)
    except NoSuchApi:
        return None
    except StoreDenied as error:
        return error


def _tls(options: StoreOptions) -> ssl.SSLContext | None:
    if any(url.startswith("https:") for url in options.endpoints):
        return tls_context(options.keyfile, options.certfile, options.cafile)
    if options.keyfile or options.certfile or options.cafile:
        log.warning("--etcd-keyfile, -certfile and -cafile are not used: all of --etcd-endpoints are http, plaintext")
    return None
