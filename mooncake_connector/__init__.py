"""KV caches to transfers: the prefill/decode connector for vLLM and SGLang."""
