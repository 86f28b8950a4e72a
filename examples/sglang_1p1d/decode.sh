#!/usr/bin/env bash
# A decode server. In an environment that has SGLang and this package:
#   MODEL=... HOST=<address of this machine> ./decode.sh [sglang flags]
# The router tells it, with each request, which prefill server to read from.
set -euo pipefail
export SGLANG_HOST_IP="$HOST"
exec python -m sglang.launch_server --model-path "$MODEL" --host "$HOST" --port "${PORT:-30001}" \
    --disaggregation-mode decode --disaggregation-transfer-backend mooncake_connector "$@"
