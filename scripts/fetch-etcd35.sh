#!/bin/sh
# Fetch etcd 3.5 into a cache directory, for the tests that run against it; nothing is installed.
#
#     scripts/fetch-etcd35.sh [DIRECTORY]     default: $WINCEY_TEST_CACHE, else ~/.cache/wincey-test
#
# Debian 12 has etcd 3.4 and Debian 13 has 3.5, whose programs run on both. This asks the Debian sources that the machine
# itself is set up with for Debian 13's packages, through apt with lists and cache of its own, and unpacks them. Prints
# the directory of the programs. When they are there already it does nothing more.
set -eu

cache=${1:-${WINCEY_TEST_CACHE:-$HOME/.cache/wincey-test}}
home=$cache/etcd-3.5
if [ -x "$home/usr/bin/etcd" ]; then
    echo "$home/usr/bin"
    exit 0
fi

fail() {
    echo "fetch-etcd35: $*" >&2
    exit 1
}

for program in apt-get dpkg-deb; do
    command -v $program >/dev/null || fail "needs $program, which this machine lacks"
done
[ -r /etc/os-release ] || fail "this is no Debian: /etc/os-release is absent"
. /etc/os-release
[ "${ID:-}" = debian ] && [ -n "${VERSION_CODENAME:-}" ] || fail "this is no Debian, and its apt sources won't do"

mkdir -p "$cache"
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/sources" "$work/lists/partial" "$work/cache/archives/partial" "$work/root"

# Only sources that name the release as a suite of its own: other vendors' suites are left alone.
for file in /etc/apt/sources.list.d/*.sources; do
    if [ -r "$file" ] && grep -Eq "^Suites:(.* )?$VERSION_CODENAME( |\$)" "$file"; then
        sed "s/$VERSION_CODENAME/trixie/g" "$file" >"$work/sources/$(basename "$file")"
    fi
done
for file in /etc/apt/sources.list /etc/apt/sources.list.d/*.list; do
    if [ -r "$file" ]; then
        grep -E "^deb .* $VERSION_CODENAME " "$file" | sed "s/$VERSION_CODENAME/trixie/g" \
            >"$work/sources/$(basename "$file" .list).list" || true
    fi
done

apt() {
    apt-get -qq -o Dir::Etc::sourcelist=/dev/null -o Dir::Etc::sourceparts="$work/sources" \
        -o Dir::State::lists="$work/lists" -o Dir::Cache="$work/cache" -o Acquire::Languages=none \
        -o APT::Sandbox::User=root "$@"
}
{
    apt update && (cd "$work" && apt download etcd-server etcd-client)
} >"$work/log" 2>&1 || fail "apt can't get Debian 13's etcd: $(tail -n 3 "$work/log" | tr '\n' ' ')"
for package in "$work"/etcd-*.deb; do
    dpkg-deb -x "$package" "$work/root"
done
version=$("$work/root/usr/bin/etcd" --version | head -n 1)
case $version in
    *" 3.5."*) ;;
    *) fail "got '$version', wanted 3.5" ;;
esac
rm -rf "$home"
mv "$work/root" "$home"
echo "$home/usr/bin"
