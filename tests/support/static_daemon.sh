#!/bin/sh
# A daemon without a store, for tests of the lab itself: it writes subnet.env and static routes to all hosts.
# static_daemon.sh SUBNET_FILE HOST NUMBER_OF_HOSTS FAMILY...    host N has 10.5.N.0/24 and fd00:5:0:N::/64
set -e
file=$1 own=${2#h} hosts=$3
shift 3
for family; do
    case $family in
    4) echo "FLANNEL_NETWORK=10.5.0.0/16"; echo "FLANNEL_SUBNET=10.5.$own.1/24" ;;
    6) echo "FLANNEL_IPV6_NETWORK=fd00:5::/48"; echo "FLANNEL_IPV6_SUBNET=fd00:5:0:$own::1/64" ;;
    esac
    for peer in $(seq 1 "$hosts"); do
        if [ "$peer" != "$own" ]; then
            case $family in
            4) ip route add "10.5.$peer.0/24" via "10.99.0.$peer" ;;
            6) ip route add "fd00:5:0:$peer::/64" via "fd00:99::$peer" ;;
            esac
        fi
    done
done > "$file.draft"
echo "FLANNEL_MTU=1500" >> "$file.draft"
mv "$file.draft" "$file"
exec sleep 1000
