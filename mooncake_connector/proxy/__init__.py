"""The embedded proxy: one OpenAI-compatible address in front of prefill and decode servers.

For one machine up to a small cluster; `docs/routers.md` says when vllm-router is the better
choice. What one request does is in `flow.py`, who gets it in `pool.py`.
"""

from mooncake_connector.proxy.config import ProxyConfig, Style
from mooncake_connector.proxy.server import Proxy, serve

__all__ = ["Proxy", "ProxyConfig", "Style", "serve"]
