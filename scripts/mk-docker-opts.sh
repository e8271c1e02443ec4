#!/bin/sh
# Turns flannel's env file into options for the Docker daemon. Runs under any POSIX shell.
#
# The env file is read with every variable exported, so that `env` then lists the options to write: those made here, those
# the env file sets and those inherited. A name found there counts only if the shell knows a variable of that name, which a
# line inside another variable's value is not.

usage() {
    cat >&2 <<END
usage: $0 [-f FILE] [-d FILE] [-i] [-c] [-m] [-k KEY]

Writes Docker daemon options made from flannel's env file. Without -i and -c both forms are written.

  -f FILE  flannel's env file (default /run/flannel/subnet.env)
  -d FILE  the file to write (default /run/docker_opts.env)
  -i       each option in a variable of its own: DOCKER_OPT_BIP, DOCKER_OPT_IPMASQ, DOCKER_OPT_MTU
  -c       all options in one variable
  -m       leave out --ip-masq
  -k KEY   the name of that one variable (default DOCKER_OPTS)
END
    exit 1
}

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

# A value as the inside of a double-quoted string, for shells and systemd's EnvironmentFile alike.
escaped() {
    printf '%s' "$1" | sed 's/[\\"$`]/\\&/g'
}

# The network of an address with its length, as `ip route` prints it: 10.1.74.1/24 gives 10.1.74.0/24. Nothing if it is none.
network_of() {
    case $1 in
    *[!0-9./]* | */*/* | *..* | *.*.*.*.* | .* | */) return ;;
    *.*.*.*/*) ;;
    *) return ;;
    esac
    length=${1#*/} rest=${1%/*}
    [ "$length" -le 32 ] || return
    a=${rest%%.*} rest=${rest#*.}
    b=${rest%%.*} rest=${rest#*.}
    c=${rest%%.*} d=${rest#*.}
    number=$(((((a << 8) + b << 8) + c << 8) + d))
    number=$((number >> (32 - length) << (32 - length)))
    printf '%d.%d.%d.%d' $((number >> 24)) $((number >> 16 & 255)) $((number >> 8 & 255)) $((number & 255))
    [ "$length" = 32 ] || printf '/%d' "$length"
}

flannel_env=/run/flannel/subnet.env
docker_env=/run/docker_opts.env
individual=
combined=
with_ipmasq=yes
key=DOCKER_OPTS

while getopts :f:d:icmk: option; do
    case $option in
    f) flannel_env=$OPTARG ;;
    d) docker_env=$OPTARG ;;
    i) individual=yes ;;
    c) combined=yes ;;
    m) with_ipmasq= ;;
    k) key=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -eq 0 ] || printf '%s: ignored: %s\n' "${0##*/}" "$*" >&2
if [ -z "$individual$combined" ]; then
    individual=yes combined=yes
fi
case $key in
'' | [0-9]* | *[!A-Za-z0-9_]*) fail "-k $key: not the name of a variable" ;;
esac

set -a
if [ -f "$flannel_env" ]; then
    case $flannel_env in
    */*) . "$flannel_env" ;;
    *) . "./$flannel_env" ;; # a name without a slash would be looked for in PATH
    esac
fi
[ -z "$FLANNEL_SUBNET" ] || DOCKER_OPT_BIP="--bip=$FLANNEL_SUBNET"
[ -z "$FLANNEL_MTU" ] || DOCKER_OPT_MTU="--mtu=$FLANNEL_MTU"
if [ "$with_ipmasq" ]; then
    # Whoever of the two does not masquerade leaves it to the other.
    case $FLANNEL_IPMASQ in
    '') ;;
    true) DOCKER_OPT_IPMASQ=--ip-masq=false ;;
    false) DOCKER_OPT_IPMASQ=--ip-masq=true ;;
    *) fail "FLANNEL_IPMASQ is \"$FLANNEL_IPMASQ\" in $flannel_env; it must be true or false" ;;
    esac
fi
set +a

output=
eval "all=\${$key}"
all=${all:+$all }
for name in $(env | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p' | LC_ALL=C sort -u); do
    eval "known=\${$name+yes} value=\${$name}"
    [ "$known" ] || continue
    all="$all $value"
    [ -z "$individual" ] || output="$output$name=\"$(escaped "$value")\"
"
done
[ -z "$combined" ] || output="$output$key=\"$(escaped "$all")\"
"
printf '%s' "$output" >"$docker_env" || fail "could not write $docker_env"

# Docker would put its bridge on a subnet that this host already reaches through another machine.
network=$(network_of "$FLANNEL_SUBNET")
if [ "$network" ] && command -v ip >/dev/null 2>&1; then
    ip route show | while read -r destination via rest; do
        [ "$destination $via" != "$network via" ] || exit 1
    done || {
        echo "Your routing table already contains the subnet: $network" >&2
        exit 1
    }
fi
