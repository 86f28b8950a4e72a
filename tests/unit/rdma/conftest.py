"""Hypothesis as CI needs it."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and no deadline: it would measure a machine that others share.
settings.register_profile("mooncake", deadline=None, derandomize=True)
settings.load_profile("mooncake")
