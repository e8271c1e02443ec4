#!/bin/sh
# Prove the README: run its commands in a newly bootstrapped minimal Debian, where nothing but make and git is installed.
#
#   scripts/fresh.sh                   every command of the README's marked block
#   FRESH_ONLY=demo scripts/fresh.sh   only `make demo`
#
# The root holds what the commit at HEAD holds. Release, mirrors, apt and pip settings, certificates and name resolution
# are this machine's, whatever they are. It runs in mount, process and host name namespaces of its own, with a root file
# system it can't look out of; the network is this machine's. It is removed at the end. What debootstrap downloads is
# kept in ~/.cache/wincey for a week.
set -eu

cd "$(dirname "$0")/.."
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
here=$(pwd -P)

say() { printf 'fresh: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# --- inside the namespaces, called by the outer part below ------------------------------------------------------------

bind() { # WHAT WHERE: a directory or file of the machine, to be read only
    if [ -d "$1" ]; then mkdir -p "$2"; else mkdir -p "$(dirname "$2")" && : >"$2"; fi
    mount --bind "$1" "$2"
    mount -o remount,bind,ro "$2"
}

local_indexes() { # directories of this machine that pip is configured to look into
    {
        cat /etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf" 2>/dev/null || :
        env | grep -E '^PIP_(FIND_LINKS|INDEX_URL|EXTRA_INDEX_URL)=' || :
    } | tr ' =,' '\n\n\n' | sed -n 's|^file://||; s|^\(/.*\)|\1|p' | while read -r path; do
        [ -d "$path" ] || continue
        path=${path%/}
        echo "${path%/simple}" # an index links to the files beside it
    done | sort -u
}

inside() {
    root=$1
    shift
    mount --bind "$root" "$root"
    cd "$root"
    mount -t proc proc proc
    mount --rbind /sys sys
    mount -t tmpfs -o mode=755 tmpfs run
    mount -t tmpfs -o mode=1777 tmpfs tmp
    mount -t tmpfs -o mode=755 tmpfs dev
    mkdir -p dev/net dev/pts dev/shm run/lock
    mount -t tmpfs -o mode=1777 tmpfs dev/shm
    mount -t devpts -o newinstance,ptmxmode=666,mode=620 devpts dev/pts
    ln -s pts/ptmx dev/ptmx
    ln -s /proc/self/fd dev/fd
    ln -s /proc/self/fd/0 dev/stdin
    ln -s /proc/self/fd/1 dev/stdout
    ln -s /proc/self/fd/2 dev/stderr
    for device in null zero full random urandom tty net/tun; do
        [ -e "/dev/$device" ] || continue
        : >"dev/$device"
        mount --bind "/dev/$device" "dev/$device"
    done
    for file in /etc/pip.conf /etc/xdg/pip/pip.conf "$HOME/.config/pip/pip.conf" "$HOME/.pip/pip.conf"; do
        [ ! -f "$file" ] || bind "$file" "$root$(echo "$file" | sed "s|^$HOME/|/root/|")"
    done
    local_indexes | while read -r path; do bind "$path" "$root$path"; done
    hostname fresh
    # A root that can't be left: the machine's own file systems are unmounted from under us.
    mkdir -p mnt/machine
    pivot_root . mnt/machine
    cd /
    umount --lazy /mnt/machine
    settings=$(env | sed -n -E 's/^(PIP_[A-Z_]*|[A-Za-z]*_(proxy|PROXY)|SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE)=.*/\1/p')
    set -- HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 TERM="${TERM:-dumb}" CI=true "$@"
    for name in $settings; do
        eval "set -- \"\$name=\${$name}\" \"\$@\""
    done
    cd /root/wincey
    exec env -i "$@"
}

if [ "${1:-}" = --inside ]; then
    shift
    inside "$@"
fi

# --- the outer part ---------------------------------------------------------------------------------------------------

[ "$(id -u)" = 0 ] || die "needs root, as it bootstraps a Debian root file system: run it with sudo"
command -v apt-get >/dev/null || die "needs a Debian-like machine with apt, whose mirror and release it uses"
command -v git >/dev/null || die "needs git"
if ! command -v debootstrap >/dev/null; then
    say "installing debootstrap"
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends debootstrap >/dev/null 2>&1 \
        || { apt-get update -q >/dev/null && apt-get install -y -q --no-install-recommends debootstrap >/dev/null; } \
        || die "apt-get could not install debootstrap"
fi

commands=$(sed -n '/<!-- fresh:begin -->/,/<!-- fresh:end -->/ s/^\(make [a-z]*\).*/\1/p' README.md)
[ -z "${FRESH_ONLY:-}" ] || commands=$(printf '%s\n' "$commands" | grep -x "make $FRESH_ONLY") \
    || die "the README has no command 'make $FRESH_ONLY'"
[ "$commands" ] || die "the README has no commands between <!-- fresh:begin --> and <!-- fresh:end -->"
[ -z "$(git status --porcelain)" ] || say "note: this proves the commit $(git rev-parse --short HEAD); changes not committed are left out"

. /etc/os-release
suite=${VERSION_CODENAME:?no VERSION_CODENAME in /etc/os-release}
# apt itself reads both forms of its sources and says what they mean.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT)' 'Created-By: Packages' \
    | awk -v suite="$suite" '$2 == suite && $3 == "main" { print $1; exit }')
[ "$mirror" ] || die "apt's sources name no mirror of $suite main"
proxy=$(apt-config shell proxy Acquire::http::Proxy) && eval "$proxy"
[ -z "${proxy:-}" ] || export http_proxy="${http_proxy:-$proxy}"

root=$(mktemp -d "${TMPDIR:-/var/tmp}/wincey-fresh.XXXXXX")
chmod 755 "$root"
trap 'rm -rf --one-file-system "$root"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

cache=${XDG_CACHE_HOME:-$HOME/.cache}/wincey
packages=$cache/debootstrap-$suite-$(dpkg --print-architecture).tar.gz
mkdir -p "$cache"
set -- --variant=minbase --include=make,git "$suite"
bootstrap() {
    debootstrap "$@" >"$root.log" 2>&1 || { tail -n 20 "$root.log" >&2; rm -f "$root.log"; die "debootstrap failed"; }
    rm -f "$root.log"
}
started=$(date +%s)
if [ -z "$(find "$packages" -mtime -7 2>/dev/null)" ]; then
    say "downloading a minimal Debian $suite"
    bootstrap --make-tarball="$packages.part" "$@" "$root" "$mirror"
    mv "$packages.part" "$packages"
    rm -rf "$root"
    mkdir "$root"
fi
say "bootstrapping a minimal Debian $suite"
bootstrap --unpack-tarball="$packages" "$@" "$root" "$mirror"

# apt as this machine has it: sources, keys, and how to fetch (but not its hooks, whose programs are absent there).
rm -f "$root/etc/apt/sources.list"
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources \
    /etc/apt/preferences /etc/apt/preferences.d /etc/apt/auth.conf /etc/apt/auth.conf.d /etc/apt/keyrings /etc/apt/trusted.gpg \
    /etc/apt/trusted.gpg.d /usr/share/keyrings /etc/ssl/certs/ca-certificates.crt /usr/local/share/ca-certificates \
    /etc/resolv.conf /etc/hosts; do
    [ -e "$file" ] || continue
    mkdir -p "$root$(dirname "$file")"
    cp -rL "$file" "$root$(dirname "$file")/"
done
apt-config dump Acquire | grep -vE '^Acquire::(IndexTargets|Changelogs|CompressionTypes|cdrom)| "";$' >"$root/etc/apt/apt.conf.d/99machine"
git clone -q --no-hardlinks "file://$here" "$root/root/wincey"
say "ready after $(($(date +%s) - started)) s: $(du -sxh "$root" | cut -f1), $(chroot "$root" dpkg-query -f '.' -W | wc -c) packages"

results=
status=0
old_ifs=$IFS
IFS='
'
for command in $commands; do
    IFS=$old_ifs
    say "\$ $command"
    started=$(date +%s)
    code=0
    # shellcheck disable=SC2086  # the words of the command
    unshare --mount --pid --uts --fork --kill-child --propagation private \
        "$here/scripts/fresh.sh" --inside "$root" $command </dev/null || code=$?
    results="$results
  $command: $([ $code = 0 ] && echo passed || echo "failed with exit code $code"), $(($(date +%s) - started)) s"
    [ $code = 0 ] || status=1
done
say "in a fresh Debian $suite:$results"
exit $status
