#!/usr/bin/env bash
# A prefill server. In an environment that has SGLang and this package:
#   MODEL=... HOST=<address that decode reaches> [ETCD=<host:port>] ./prefill.sh [sglang flags]
# Without ETCD its ranks register with its own bootstrap server by HTTP.
set -euo pipefail
export SGLANG_HOST_IP="$HOST" MOONCAKE_TE_META_DATA_SERVER="${ETCD:-}"
exec python -m sglang.launch_server --model-path "$MODEL" --host "$HOST" --port "${PORT:-30000}" \
    --disaggregation-mode prefill --disaggregation-transfer-backend mooncake_connector \
    --disaggregation-bootstrap-port "${BOOTSTRAP_PORT:-8998}" "$@"
