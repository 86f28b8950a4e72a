"""The vLLM plugin: `MooncakeDisaggConnector` and what stands behind it."""
