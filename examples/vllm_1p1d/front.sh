#!/usr/bin/env bash
# What clients talk to: a proxy that finds prefill and decode servers in etcd as they come and go.
#   ETCD=<host:port> ./front.sh [flags of mooncake-connector proxy]
# No etcd yet? `mooncake-connector etcd --data-dir DIR --host <address>` runs one (extra [etcd]).
set -euo pipefail
config=$(mktemp)
trap 'rm -f "$config"' EXIT
cat >"$config" <<JSON
{"engine": {"metadata": {"backend": "etcd", "endpoints": ["$ETCD"]}}}
JSON
mooncake-connector proxy --config "$config" --port "${PORT:-8000}" "$@"
