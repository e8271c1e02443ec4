"""flanneld: flags in, exit code out. Nothing but the flags is imported until they are known to be right."""

# ruff: noqa: PLC0415  # see the docstring: `flanneld --help` must not wait for what it does not need

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from wincey.cli.options import Options, load
from wincey.model.errors import WinceyError

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from wincey.agent.life import DaemonOptions
    from wincey.model.fastpath import Engine
    from wincey.store.open import StoreOptions

_FAST_PATH_ENGINES: Mapping[str, Engine] = {"bpf": "bpf", "flowtable": "flowtable"}
"""By values of --fast-path that demand one."""


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:], os.environ))


def run(arguments: Sequence[str], environ: Mapping[str, str]) -> int:
    """Run flanneld; returns the exit code (compatibility reference, section 1.4)."""
    no_writing_by_others()
    try:
        options = load(arguments, environ)
    except WinceyError as error:
        print(f"flanneld: {error}", file=sys.stderr)
        return error.exit_code
    if isinstance(options, str):
        sys.stderr.write(options)
        return 0
    return _start(options)


def no_writing_by_others() -> None:
    """Whatever umask we inherit: what we make is for us alone to write. Files that need more are given it by name."""
    os.umask(os.umask(0o022) | 0o022)


def _start(options: Options) -> int:
    import asyncio
    import logging

    from wincey import __version__
    from wincey.observe.log import set_up_logging

    set_up_logging(options.log_format, options.verbosity)
    log = logging.getLogger("wincey.cli.flanneld")
    log.info("wincey %s: %s", __version__, options.description or "no flags given")
    for complaint in options.errors:
        log.error("%s", complaint)
    for warning in options.warnings:
        log.warning("%s", warning)

    try:
        asyncio.run(_work(options))
    except WinceyError as error:
        log.critical("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _work(options: Options) -> Coroutine[None, None, object]:
    if options.cleanup:
        return _clean_up(options)
    if options.listen:
        from wincey.agent.serving import ServerOptions, serve_remote

        return serve_remote(
            ServerOptions(
                store=_store_options(options),
                prefix=options.etcd_prefix,
                where=options.listen,
                keyfile=options.remote_keyfile,
                certfile=options.remote_certfile,
                cafile=options.remote_cafile,
                token_file=options.remote_token_file,
                healthz_ip=options.healthz_ip,
                healthz_port=options.healthz_port,
                cloud_routes=options.cloud_routes,
            )
        )
    from wincey.agent.daemon import serve

    return serve(daemon_options(options))


def _clean_up(options: Options) -> Coroutine[None, None, object]:
    from wincey.agent.life import clean_up
    from wincey.agent.networks import clean_up_all

    several = options.networks or options.watch_networks
    return clean_up_all(options.subnet_dir) if several else clean_up(options.subnet_file)


def daemon_options(options: Options) -> DaemonOptions:
    """What the process needs to know, from its flags."""
    from wincey.agent.hostfacts import Wishes
    from wincey.agent.life import DaemonOptions, Several
    from wincey.agent.network import Settings
    from wincey.agent.planner import Policy
    from wincey.agent.udpengine import UdpWishes
    from wincey.observe.apilisten import ApiListen

    return DaemonOptions(
        store=_store_options(options),
        prefix=options.etcd_prefix,
        settings=Settings(
            subnet_file=options.subnet_file,
            margin=options.subnet_lease_renew_margin,
            policy=Policy(
                masquerade=options.ip_masq,
                forward=options.iptables_forward_rules,
                random_fully=not options.ip_masq_fully_random_disable,
                exclude=options.ip_masq_exclude,
                blackhole=options.ip_blackhole_route,
                fast_path_mark=0 if options.fast_path == "off" else options.fast_path_mark,
                fast_path_engine=_FAST_PATH_ENGINES.get(options.fast_path, "auto"),
            ),
        ),
        wishes=Wishes(
            iface=options.iface,
            iface_regex=options.iface_regex,
            iface_can_reach=options.iface_can_reach,
            public_ip=options.public_ip,
            public_ipv6=options.public_ipv6,
        ),
        healthz_ip=options.healthz_ip,
        healthz_port=options.healthz_port,
        api_socket=_api_socket(options),
        api_group=options.api_group,
        api_listen=ApiListen(*options.api_listen, options.api_certfile, options.api_keyfile, options.api_token_file)
        if options.api_listen
        else None,
        metrics_peers=options.metrics_peers,
        udp=UdpWishes(options.udp_engine, options.udp_source_check),
        probe=float(options.probe_interval) if options.probe else 0.0,
        metrics_listen=options.metrics_listen or ("", 0),
        # flannel probes its rules this often. Notifications make that unnecessary; a longer period is respected.
        audit=max(60.0, options.iptables_resync),
        several=Several(options.networks, options.watch_networks, options.subnet_dir)
        if options.networks or options.watch_networks
        else None,
    )


def _api_socket(options: Options) -> str:
    from wincey.model.socketpath import of_networks, of_subnet_file

    if options.api_socket == "off":
        return ""
    if options.api_socket not in {"", "auto"}:
        return options.api_socket
    several = options.networks or options.watch_networks
    return of_networks(options.subnet_dir) if several else of_subnet_file(options.subnet_file)


def _store_options(options: Options) -> StoreOptions:
    from wincey.store.open import RemoteOptions, StoreOptions

    remote = RemoteOptions(
        servers=options.remote,
        keyfile=options.remote_keyfile,
        certfile=options.remote_certfile,
        cafile=options.remote_cafile,
        token_file=options.remote_token_file,
    )
    return StoreOptions(
        store=f"sqlite:{options.sqlite_path}" if options.sqlite_path else "etcd",
        api=options.etcd_api,  # type: ignore[arg-type]  # its flag takes no other values
        endpoints=list(options.etcd_endpoints),
        keyfile=options.etcd_keyfile,
        certfile=options.etcd_certfile,
        cafile=options.etcd_cafile,
        username=options.etcd_username,
        password=options.etcd_password,
        remote=remote if options.remote else None,
    )


if __name__ == "__main__":
    main()
