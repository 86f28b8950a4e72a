"""The backend `mooncake_connector` for SGLang's `--disaggregation-transfer-backend`.

`register.py` is where SGLang finds us; everything that moves KV is shared with vLLM and lies one
folder up. Importing this package imports no SGLang.
"""
