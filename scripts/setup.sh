#!/bin/sh
# Bring this machine to where a make target can run, and do nothing when it is there already.
#
#   scripts/setup.sh demo     the programs and what the demo needs; a missing program is an error
#   scripts/setup.sh check    the programs and the developers' tools
#   scripts/setup.sh test     both, and what the tests need; tests skip what is missing all the same
#
# What is missing is found by looking for the programs themselves, so that it works on any system; only the cure (one
# apt-get call, as root) is Debian's. pip and apt are used as the machine has them configured.
set -eu

cd "$(dirname "$0")/.."
purpose=${1:?usage: scripts/setup.sh demo|check|test}
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin:/usr/lib/cni:/usr/lib/ipsec
here=$(pwd -P)

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# --- programs of the system: PROGRAM:DEBIAN-PACKAGE -------------------------------------------------------------------

demo_programs="ip:iproute2 nft:nftables ping:iputils-ping"
test_programs="$demo_programs iptables:iptables iperf3:iperf3 etcd:etcd-server etcdctl:etcd-client ethtool:ethtool tcpdump:tcpdump sysctl:procps
               openssl:openssl bash:bash busybox:busybox-static git:git curl:curl podman:podman containerd:containerd ctr:containerd
               bird:bird2 vtysh:frr runc:runc host-local:containernetworking-plugins
               charon:strongswan-charon swanctl:strongswan-swanctl swanctl:libstrongswan-standard-plugins lookip:libcharon-extra-plugins
               ovs-vswitchd:openvswitch-switch
               wireguard-go:wireguard-go wg:wireguard-tools
               cc:gcc cc:libc6-dev
               dockerd:docker.io docker:docker.io systemd-nspawn:systemd-container systemd-analyze:systemd
               clang:clang clang:libbpf-dev qemu-system-x86_64:qemu-system-x86 cpio:cpio modprobe:kmod promtool:prometheus chromium:chromium mandoc:mandoc groff:groff-base"

packages_missing() { # of the programs named: their packages
    for pair in "$@"; do
        has "${pair%%:*}" || printf '%s ' "${pair#*:}"
    done
}

find_python() { # a Python of 3.11 or later that can make virtual environments; the machine's own default first
    for candidate in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

can_install() { [ "$(id -u)" = 0 ] && has apt-get; }

quietly() { # run a command; show what it said only if it fails
    log=$(mktemp)
    if "$@" >"$log" 2>&1 </dev/null; then
        rm -f "$log"
    else
        cat "$log" >&2
        rm -f "$log"
        return 1
    fi
}

apt_install() {
    # Packages such as etcd-server start their daemon when installed. Debian asks policy-rc.d first; 101 means no.
    policy=/usr/sbin/policy-rc.d
    ours=
    if [ ! -e "$policy" ]; then
        trap 'rm -f "$policy"' EXIT
        trap 'exit 130' INT TERM
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        ours=yes
    fi
    set -- apt-get install -y -q --no-install-recommends -o DPkg::Lock::Timeout=300 "$@"
    export DEBIAN_FRONTEND=noninteractive
    # The package lists are renewed only when there are none, or when they turn out to be stale.
    if ! ls /var/lib/apt/lists/*Packages* >/dev/null 2>&1 || ! "$@" >/dev/null 2>&1 </dev/null; then
        quietly apt-get update -q -o DPkg::Lock::Timeout=300 || say "apt-get update failed; going on with the lists as they are"
        quietly "$@" || die "apt-get could not install what is missing (see above)"
    fi
    if [ "$ours" ]; then
        rm -f "$policy"
        trap - EXIT INT TERM
    fi
    # Installed for tests that start servers of their own: the next boot must not start one either.
    case " $* " in *" etcd-server "*) ! has systemctl || systemctl disable etcd >/dev/null 2>&1 || : ;; esac
    case " $* " in *" prometheus "*) ! has systemctl || systemctl disable prometheus >/dev/null 2>&1 || : ;; esac
    case " $* " in *" docker.io "*) ! has systemctl || systemctl disable docker.service docker.socket >/dev/null 2>&1 || : ;; esac
    case " $* " in *" bird2 "*) ! has systemctl || systemctl disable bird >/dev/null 2>&1 || : ;; esac
    case " $* " in *" openvswitch-switch "*) ! has systemctl || systemctl disable openvswitch-switch ovsdb-server ovs-vswitchd >/dev/null 2>&1 || : ;; esac
    case " $* " in *" frr "*) ! has systemctl || systemctl disable frr >/dev/null 2>&1 || : ;; esac
}

case $purpose in
demo) wanted=$demo_programs extra= ;;
check) wanted="" extra=dev ;;
test) wanted=$test_programs extra=dev ;;
*) die "no such purpose: $purpose (demo, check or test)" ;;
esac

# shellcheck disable=SC2086  # lists of words
missing=$(packages_missing $wanted)
python=
no_venv=
no_python=
# One that moved with the tree has programs that name the old place.
if ! .venv/bin/python -c '' 2>/dev/null || { [ -f .venv/.made-in ] && [ "$(cat .venv/.made-in)" != "$here" ]; }; then
    no_venv=yes
    python=$(find_python) || no_python="python3 python3-venv "
fi
if [ "$missing$no_python" ]; then
    if can_install; then
        say "installing Debian packages: $missing$no_python"
        # shellcheck disable=SC2086
        apt_install $missing $no_python
    elif [ "$purpose" = test ] && [ -z "$no_python" ]; then
        say "missing, so the tests that need them are skipped: $missing(Debian packages; as root this installs them)"
    else
        die "missing: $missing$no_python(Debian packages; as root on a Debian-like system this installs them)"
    fi
fi
if [ "$purpose" = demo ] && [ "$(id -u)" != 0 ]; then
    die "this needs root, as it makes network namespaces: run it with sudo"
fi

# --- the virtual environment ------------------------------------------------------------------------------------------

if [ "$no_venv" ]; then
    [ "$python" ] || python=$(find_python) || die "no Python 3.11 or later with venv and ensurepip; set PYTHON=/path/to/python3"
    say "making .venv with $("$python" --version)"
    rm -rf .venv
    quietly "$python" -m venv .venv || die "$python could not make a virtual environment (see above)"
    printf '%s\n' "$here" >.venv/.made-in
fi

# The stamp tells what it was made from: after a change of pyproject.toml, or of what is compiled, pip runs again.
made_from=$(cat pyproject.toml hatch_build.py src/wincey/tunnel/core/* scripts/setup.sh | cksum)
stamp() { printf '.venv/.set-up-%s' "${1:-run}"; }
current() { [ -f "$1" ] && [ "$(cat "$1")" = "$made_from" ]; }

if ! current "$(stamp dev)" && { [ "$extra" ] || ! current "$(stamp)"; }; then
    say "installing wincey into .venv${extra:+ with what development needs}"
    quietly .venv/bin/python -m pip install --disable-pip-version-check -q -e ".${extra:+[$extra]}" \
        || die "pip could not install wincey (see above)"
    # The script itself rather than the copy that pip makes, as everything else in .venv is the tree's own.
    ln -sf ../../scripts/mk-docker-opts.sh .venv/bin/mk-docker-opts.sh
    ln -sf ../../scripts/docker-bridge.sh .venv/bin/docker-bridge.sh
    printf '%s\n' "$made_from" >"$(stamp "$extra")"
fi
