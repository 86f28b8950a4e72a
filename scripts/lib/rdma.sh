# Sourced by setup.sh: where the RDMA tests can run, what they need, and running them there.
# shellcheck shell=bash

# The machine's own devices, or nothing.
own_rdma_devices() { ls /sys/class/infiniband 2>/dev/null || true; }

# Print why the RDMA tests cannot run on this machine at all; nothing when they can.
no_rdma_here() {
    [[ -z $(own_rdma_devices) ]] || return 0
    local ID="" VERSION_ID="" lacks="no RDMA device here, and the guest that would have some needs"
    # shellcheck source=/dev/null
    [[ ! -r /etc/os-release ]] || source /etc/os-release
    if [[ $ID != debian || ! $VERSION_ID =~ ^1[23]$ ]]; then
        echo "$lacks Debian 12 or 13, this is ${ID:-unknown} $VERSION_ID"
    elif [[ $(uname -m) != x86_64 ]]; then
        echo "$lacks an x86_64, this is $(uname -m)"
    elif ! command -v apt-get >/dev/null; then
        echo "$lacks apt-get"
    fi
}

# Print the Debian packages that are missing; elsewhere the tests themselves say what they miss.
missing_rdma_packages() {
    [[ -z $(no_rdma_here) ]] && command -v dpkg-query >/dev/null || return 0
    local package
    local -a needed=(libibverbs1 ibverbs-providers ibverbs-utils perftest python3-pyverbs tcpdump)
    needed+=(libibverbs-dev gcc) # a unit test compares our structures with the C header
    [[ $(own_rdma_devices) ]] || needed+=(qemu-system-x86 busybox-static iproute2 kmod zstd)
    for package in "${needed[@]}"; do
        [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) == installed ]] ||
            echo "$package"
    done
    # the system's own Python makes the environment of pyverbs
    [[ -x /usr/bin/python3 ]] && /usr/bin/python3 -c 'import ensurepip, venv' 2>/dev/null ||
        echo python3-venv
}

has_pyverbs() { /usr/bin/python3 -c 'import pyverbs.device' 2>/dev/null; }

# where_rdma_is COMMAND...: run it here when there are devices, else in the guest, which writes to
# .cache/logs and nowhere else. The status is the command's; 124: out of time; 125: no guest.
where_rdma_is() {
    if [[ $(own_rdma_devices) ]]; then
        timeout --foreground -k 10 20m "$@"
    else
        "$root/.venv/bin/python" scripts/lib/harness/guest.py --limit 1200 \
            --share "$cache/logs" -- "$@"
    fi
}

# What the RDMA tests move again: pages that vLLM's tests wrote down, .cache/recordings.
has_recording() {
    [[ -x $root/.venv/bin/python ]] &&
        "$root/.venv/bin/python" tests/helpers/kv_recording.py >/dev/null 2>&1
}

record_pages() {
    MOONCAKE_TEST_MODEL=$tiny_model MOONCAKE_TEST_LOGS=$cache/logs/recording \
        "$root/.venv-vllm/bin/pytest" --timeout 900 tests/integration/vllm/test_recording.py
}

# Exit status: 1, 2 or 3 as rdma_tests.sh says, another one when it did not come to its end.
rdma_tests() {
    local status=0 log
    local -a logs=("$cache/logs/test-rdma.log" "$cache/logs/test-rdma-pyverbs.log")
    rm -f "${logs[@]}"
    where_rdma_is bash scripts/lib/rdma_tests.sh "$cache/logs" "${more[@]}" || status=$?
    [[ -f ${logs[0]} && -f ${logs[1]} ]] || ((status > 3)) || status=125
    ((status > 3)) || return $status
    for log in "${logs[@]}"; do
        echo "rdma tests: no end (status $status; 124: more than 20 minutes)" >>"$log"
    done
    return $status
}
