#!/bin/busybox sh
# The guest's first process: reach the machine's own root, lay a file system in memory over it, so
# that every write is lost with the guest, and go on there with second.sh.
box=/bin/busybox
$box mount -t devtmpfs dev /dev
for module in $($box cat /modules/order); do
    $box insmod "/modules/$module" || echo "insmod $module failed"
done
# cache=loose: nobody else's writes are looked for, which halves a Python's start
nine=trans=virtio,version=9p2000.L,msize=524288,access=any
$box mount -t 9p -o "$nine,cache=loose,ro,noatime" machine /lower || echo "no root by 9p"
$box mount -t tmpfs -o size=90% tmpfs /up
$box mkdir -p /up/upper /up/work
$box mount -t overlay -o lowerdir=/lower,upperdir=/up/upper,workdir=/up/work overlay /new ||
    echo "no overlay"
$box mkdir -p /new/proc /new/sys /new/dev /new/run /new/tmp
$box mount --move /dev /new/dev
$box mount -t proc proc /new/proc
$box mount -t sysfs sys /new/sys
$box mount -t tmpfs run /new/run
$box mkdir -p /new/run/guest
$box mount -t 9p -o "$nine,cache=none" control /new/run/guest || echo "no control share"
exec $box switch_root /new /bin/bash /run/guest/second.sh
