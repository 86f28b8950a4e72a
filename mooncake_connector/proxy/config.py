"""The proxy's settings, and the servers that they name."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import SplitResult, urlsplit

import msgspec
from mooncake_engine.config import Port, Seconds
from mooncake_engine.errors import ConfigError

from mooncake_connector.bootstrap import DEFAULT_PORT
from mooncake_connector.cluster import Listing

Style = Literal["prefill-first", "both-at-once"]
STYLES: tuple[Style, ...] = ("prefill-first", "both-at-once")


class ProxyConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the proxy can be told.

    Attributes:
        host: Address to listen on.
        port: 0 takes any; then see `Proxy.port`.
        prefill: Base URLs that are always known, each "http://host:port", or
            "http://host:port,BOOTSTRAP_PORT" when its bootstrap server is not on 8998.
        decode: Base URLs that are always known.
        style: Who starts when; `both-at-once` overlaps reading with the prefill.
        first_byte_timeout_s: A client without a first byte gets 504 after this.
        stall_timeout_s: Longest pause between two pieces of an answer, on either side.
        connect_timeout_s: For one connection to a server.
        max_body_bytes: Longest request; images travel in it.
        allow_overrides: Let clients set `kv_transfer_params` and the style. For tests only:
            these parameters name addresses that decode connects to.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    prefill: tuple[str, ...] = ()
    decode: tuple[str, ...] = ()
    style: Style = "prefill-first"
    first_byte_timeout_s: Seconds = 300.0
    stall_timeout_s: Seconds = 300.0
    connect_timeout_s: Seconds = 5.0
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1024, le=1 << 30)] = 64 << 20
    allow_overrides: bool = False


def fixed_listings(config: ProxyConfig) -> list[Listing]:
    """The servers that `config` names.

    Raises:
        ConfigError: For what is no URL, naming it.
    """
    bootstraps: dict[str, str] = {}
    for text in config.prefill:
        url, _, port = text.partition(",")
        host = _server_url(url, "prefill").hostname or ""
        if port and not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise ConfigError(
                f"prefill is {text!r}: the bootstrap port behind the comma is no port"
            )
        shown = f"[{host}]" if ":" in host else host
        bootstraps[url.rstrip("/")] = f"http://{shown}:{port or DEFAULT_PORT}"
    decode = {_server_url(url, "decode").geturl().rstrip("/") for url in config.decode}
    return [
        Listing(
            url=url,
            prefill=url in bootstraps,
            decode=url in decode,
            bootstrap=bootstraps.get(url, ""),
        )
        for url in sorted(bootstraps.keys() | decode)
    ]


def _server_url(url: str, field: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket without its pair
        usable = False
    if not usable or parts.query or parts.fragment:
        raise ConfigError(f"{field} is {url!r}, not a base URL such as http://127.0.0.1:8100")
    return parts
