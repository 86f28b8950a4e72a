# Sourced by every script, from the repository's root. Nothing is installed outside .venv*/ and
# .cache/, except Debian's packages, by apt-get.
# shellcheck shell=bash

root=$PWD
cache=$root/.cache
mkdir -p "$cache/logs"

# pip, vLLM and Hugging Face keep their caches below XDG_CACHE_HOME, inductor wants its own name.
export XDG_CACHE_HOME=$cache
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor
export PIP_DISABLE_PIP_VERSION_CHECK=1

assume_yes=${assume_yes:-no} # set to yes by a script's -y

say() { printf '==> %s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 2
}

# shellcheck source=scripts/lib/machine.sh
source scripts/lib/machine.sh
# shellcheck source=scripts/lib/environments.sh
source scripts/lib/environments.sh
# shellcheck source=scripts/lib/rdma.sh
source scripts/lib/rdma.sh

step_names=()
step_seconds=()
step_status=0

# step NAME COMMAND...: run it, remember how long it took, leave its status in `step_status`.
# (Called with `||`, bash would switch `set -e` off inside, so the status is not returned.)
step() {
    local name=$1 begin=$SECONDS
    shift
    say "$name"
    set +e
    (
        set -e
        "$@"
    )
    step_status=$?
    set -e
    step_names+=("$name")
    step_seconds+=($((SECONDS - begin)))
}

minutes_per_step() {
    local i
    echo
    for i in "${!step_names[@]}"; do
        printf '%8s min  %s\n' "$(awk "BEGIN {printf \"%.1f\", ${step_seconds[i]} / 60}")" \
            "${step_names[i]}"
    done
}

# tested TIER PYTEST ARGUMENT...: run pytest and keep what it prints, for `closing_lines`.
tested() {
    local tier=$1
    shift
    "$@" "${more[@]}" 2>&1 | tee "$cache/logs/test-$tier.log"
}

# closing_lines TIER... -- FAILED...: pytest's last line of each tier, those of failed ones last,
# so that whoever reads the end of the output alone is not misled.
closing_lines() {
    local tier failed=no
    local -a good=() bad=()
    for tier in "$@"; do
        [[ $tier == -- ]] && failed=yes && continue
        [[ $failed == yes ]] && bad+=("$tier") || good+=("$tier")
    done
    for tier in "${good[@]}"; do
        [[ " ${bad[*]} " == *" $tier "* ]] || tail -n 1 "$cache/logs/test-$tier.log"
    done
    for tier in "${bad[@]}"; do
        tail -n 1 "$cache/logs/test-$tier.log"
    done
}
