# The guest's first process once the machine's root is there: devices, networks, the command, and
# its exit status into a file that the outside reads. /run/guest is shared with the outside.
# shellcheck shell=bash
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
guest=/run/guest
source $guest/settings.sh # GUEST_LIMIT, GUEST_MODULES, GUEST_FOLDER, GUEST_SHARES, GUEST_RAILS

# Should whoever started QEMU be killed, the guest must not run for ever.
(sleep "$GUEST_LIMIT" && echo o >/proc/sysrq-trigger) &
watchdog=$!

mkdir -p /dev/shm /dev/pts /lib/modules /run/lock
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts devpts /dev/pts
ln -sfn /proc/self/fd /dev/fd
mount --bind "$GUEST_MODULES" /lib/modules
number=0
for folder in "${GUEST_SHARES[@]}"; do
    mount -t 9p -o trans=virtio,version=9p2000.L,msize=524288,cache=none,access=any \
        "share$number" "$folder"
    number=$((number + 1))
done
hostname guest
ip link set lo up

for port in /sys/class/virtio-ports/*; do
    [[ $(<"$port/name") == output ]] && output=/dev/${port##*/}
done
exec 3>"$output"
status=0
if [[ $GUEST_RAILS ]]; then
    bash -e "$GUEST_RAILS" make >$guest/rails.log 2>&1 || status=$?
    ((status == 0)) || { echo "guest: no Soft-RoCE:" && cat $guest/rails.log; } >&3
fi
cut -d' ' -f1 /proc/uptime >$guest/ready
if ((status == 0)); then
    ulimit -l unlimited
    (
        cd "$GUEST_FOLDER" || exit
        source $guest/environment.sh
        exec setsid bash $guest/command.sh
    ) </dev/null >&3 2>&3
    status=$?
fi
kill $watchdog
dmesg >$guest/dmesg
echo $status >$guest/status.part
mv $guest/status.part $guest/status
exec 3>&-
sync
echo o >/proc/sysrq-trigger
sleep 10
