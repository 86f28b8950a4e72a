#!/usr/bin/env bash
# Soft-RoCE over veth pairs, in the guest: two rails, rxe0 to rxe1 over pair A, rxe2 to rxe3 over B.
#   rails.sh make           load the driver, make both pairs and the four devices
#   rails.sh lower A|B      take a pair down: nothing moves between its two devices
#   rails.sh raise A|B      and up again, with the routes and neighbours that went with it
# Both ends lie in one name space (rxe knows no other before kernel 6.12 or so), where packets from
# one to the other would go by lo, and rxe drops them there. Hence the routes: rules by source and
# destination that come before the local table.
set -eu

mtu=4200 # leaves 4096 for RDMA

pair() { # sets: first, the number of the pair's first end; net, its addresses but the last digit
    case $1 in
        A) first=0 net=10.77.0.1 ;;
        B) first=2 net=10.78.0.1 ;;
        *) echo "rails.sh: no pair '$1'; there are A and B" >&2 && exit 2 ;;
    esac
}

raise() {
    pair "$1"
    local end here there
    { # one process: in an emulated machine each costs a tenth of a second and more
        for end in 0 1; do echo "link set rx$((first + end)) mtu $mtu up"; done
        for end in 0 1; do
            here=rx$((first + end)) there=$(<"/sys/class/net/rx$((first + 1 - end))/address")
            echo "route replace $net$((1 - end)) dev $here table $((100 + first + end))"
            echo "neigh replace $net$((1 - end)) lladdr $there dev $here"
        done
    } | ip -batch -
}

lower() {
    pair "$1"
    printf 'link set rx%d down\n' "$first" $((first + 1)) | ip -batch -
}

make_pair() {
    pair "$1"
    local end here number
    ip link add "rx$first" type veth peer name "rx$((first + 1))"
    for end in 0 1; do
        number=$((first + end)) here=rx$((first + end))
        sysctl -qw "net.ipv4.conf.$here.accept_local=1" "net.ipv4.conf.$here.rp_filter=0"
        sysctl -qw "net.ipv6.conf.$here.accept_dad=0"
        ip addr add "$net$end/24" dev "$here"
        ip rule add pref $((10 + number)) iif "$here" lookup local
        ip rule add pref $((20 + number)) from "$net$end" to "$net$((1 - end))" \
            lookup $((100 + number))
    done
    raise "$1"
    for end in 0 1; do
        rdma link add "rxe$((first + end))" type rxe netdev "rx$((first + end))"
    done
}

make() {
    modprobe rdma_rxe
    modprobe ib_uverbs
    sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.all.accept_local=1
    make_pair A
    make_pair B
    ip rule add pref 50 lookup local
    ip rule del pref 0
    chmod 666 /dev/infiniband/* # as udev would; there is none here
    rdma link
}

"$@"
