#!/usr/bin/env bash
# What clients talk to: SGLang's own router (`pip install sglang-router`), in front of one pair.
#   PREFILL=http://<host>:30000 DECODE=http://<host>:30001 ./router.sh [flags of sglang-router]
# More servers: more `--prefill URL BOOTSTRAP_PORT` and `--decode URL` behind it.
set -euo pipefail
exec python -m sglang_router.launch_router --pd-disaggregation \
    --prefill "$PREFILL" "${BOOTSTRAP_PORT:-8998}" --decode "$DECODE" \
    --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" "$@"
