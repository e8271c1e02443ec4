#!/bin/sh
# Takes from Docker's bridge the addresses that are not this host's subnet, before Docker starts. Runs under any POSIX shell.
#
# A bridge outlives its engine. After the subnet changed, docker0 still has the address of the old one, and with it a route
# that is preferred to flannel's: the containers of the host that has that subnet by now could not be reached from here. Old
# engines also refuse to start when the bridge's address is not --bip. Nothing is added: Docker gives the bridge its address.

usage() {
    cat >&2 <<END
usage: $0 [-f FILE] [-b BRIDGE]

Removes all IPv4 addresses but the one in flannel's env file from Docker's bridge. To be run before dockerd starts.
Exit code 1 if the env file has no subnet: Docker must not start yet.

  -f FILE    flannel's env file (default /run/flannel/subnet.env)
  -b BRIDGE  Docker's bridge (default docker0)
END
    exit 1
}

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

flannel_env=/run/flannel/subnet.env
bridge=docker0
while getopts :f:b: option; do
    case $option in
    f) flannel_env=$OPTARG ;;
    b) bridge=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -eq 0 ] || usage

[ -f "$flannel_env" ] || fail "$flannel_env is not there: does flanneld run, and is it ready?"
subnet=$(sed -n 's/^FLANNEL_SUBNET=//p' "$flannel_env")
[ "$subnet" ] || fail "$flannel_env has no FLANNEL_SUBNET: Docker's bridge needs an IPv4 subnet"
command -v ip >/dev/null 2>&1 || fail "ip is not installed (package iproute2)"
ip link show dev "$bridge" >/dev/null 2>&1 || exit 0 # Docker will make it

addresses=$(ip -4 -oneline address show dev "$bridge" | sed -n 's/.* inet \([0-9./]*\) .*/\1/p')
for address in $addresses; do
    [ "$address" != "$subnet" ] || continue
    # Another one of the same network goes with the first, unless the kernel promotes it.
    ip -4 address show dev "$bridge" | grep -qwF "inet $address" || continue
    ip address delete "$address" dev "$bridge" || fail "$address could not be removed from $bridge"
    echo "removed $address from $bridge; this host's subnet is $subnet" >&2
done
