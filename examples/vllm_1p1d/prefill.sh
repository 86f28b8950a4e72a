#!/usr/bin/env bash
# A prefill server. In an environment that has vLLM and this package:
#   MODEL=... HOST=<address that decode reaches> ETCD=<host:port> ./prefill.sh [vllm flags]
set -euo pipefail
exec vllm serve "$MODEL" --host "$HOST" --port "${PORT:-8100}" --kv-transfer-config "$(
    cat <<JSON
{"kv_connector": "MooncakeDisaggConnector",
 "kv_role": "kv_producer",
 "kv_connector_extra_config": {
   "http_url": "http://$HOST:${PORT:-8100}",
   "engine": {"host": "$HOST", "metadata": {"backend": "etcd", "endpoints": ["$ETCD"]}}}}
JSON
)" "$@"
