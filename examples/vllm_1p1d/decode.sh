#!/usr/bin/env bash
# A decode server. In an environment that has vLLM and this package:
#   MODEL=... HOST=<address that prefill reaches> ETCD=<host:port> ./decode.sh [vllm flags]
set -euo pipefail
exec vllm serve "$MODEL" --host "$HOST" --port "${PORT:-8200}" --kv-transfer-config "$(
    cat <<JSON
{"kv_connector": "MooncakeDisaggConnector",
 "kv_role": "kv_consumer",
 "kv_connector_extra_config": {
   "http_url": "http://$HOST:${PORT:-8200}",
   "engine": {"host": "$HOST", "metadata": {"backend": "etcd", "endpoints": ["$ETCD"]}}}}
JSON
)" "$@"
