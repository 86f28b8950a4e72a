"""Moves bytes between registered regions of two processes; knows nothing of KV caches."""
