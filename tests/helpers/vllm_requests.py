"""The ways a completion can take: one server, two legs by hand, or whatever is in front."""

from __future__ import annotations

import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from harness.completions import MODEL, post
from harness.servers import HOST, get
from server_stage import REPLY_S, LeavingClient

if TYPE_CHECKING:
    from harness.servers import Server
    from vllm_stage import Stage

Tokens = list[list[int]]  # of every choice, in order

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KEEP = {"do_remote_decode": True}


def body(prompt: object, max_tokens: int = 16, **more: object) -> dict[str, Any]:
    """A greedy request; a list of chat messages is a chat."""
    chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], dict)
    return {
        "model": MODEL,
        "messages" if chat else "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **more,
    }


def send(server: Server, prompt: object, **more: object) -> dict[str, Any]:
    """The JSON answer of one server, router or proxy; `CompletionFailed` for an error."""
    asked = body(prompt, **more)
    return post(server.url, CHAT if "messages" in asked else COMPLETIONS, asked, REPLY_S)


def ask(server: Server, prompt: object, **more: object) -> Tokens:
    """The token ids that it answers."""
    return tokens_of(send(server, prompt, **more))


def tokens_of(answer: dict[str, Any]) -> Tokens:
    """Token ids of each choice."""
    return [c["token_ids"] for c in sorted(answer["choices"], key=lambda c: int(c["index"]))]


def prefill_leg(stage: Stage, prompt: object, **more: object) -> dict[str, Any]:
    """Compute and keep the prompt's KV; returns the `kv_transfer_params` for decode."""
    alone = {k: v for k, v in more.items() if k not in ("max_tokens", "n", "min_tokens")}
    answer = send(stage.prefill, prompt, max_tokens=1, kv_transfer_params=KEEP, **alone)
    params: dict[str, Any] = answer["kv_transfer_params"]
    return params


def prefill_first(
    stage: Stage, prompt: object, path: str = "", delay_s: float = 0, **more: object
) -> Tokens:
    """Both legs by hand, as a router in NIXL's style sends them."""
    params = prefill_leg(stage, prompt, **more)
    return ask(stage.decode, prompt, kv_transfer_params=params | slowed(path, delay_s), **more)


def both_at_once(
    stage: Stage, prompt: object, path: str = "", delay_s: float = 0, **more: object
) -> Tokens:
    """Both legs by hand at the same time, in the style of Mooncake's routers."""
    for_prefill, for_decode = shared_transfer(stage)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(
            send, stage.prefill, prompt, max_tokens=1, kv_transfer_params=for_prefill
        )
        params = for_decode | slowed(path, delay_s)
        tokens = ask(stage.decode, prompt, kv_transfer_params=params, **more)
        first.result(REPLY_S)
    return tokens


def shared_transfer(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
    """`kv_transfer_params` of a prefill leg and of a decode leg that share a new transfer id."""
    bootstrap = f"http://{HOST}:{stage.bootstrap_port}"
    engines = json.loads(get(bootstrap, "/query")[1])
    name = f"xfer-{uuid.uuid4().hex}"
    return (
        {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": name},
        {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": name,
            "remote_bootstrap_addr": bootstrap,
            "remote_engine_id": engines["0"]["engine_id"],
        },
    )


def slowed(path: str, delay_s: float) -> dict[str, Any]:
    """What only decode servers with `testing` understand; every request resets the delay."""
    return ({"test_protocol": path} if path else {}) | {"test_delay_s": delay_s}


class Client(LeavingClient):
    """A request whose client goes away when the test wants it."""

    def __init__(self, server: Server, prompt: object, **more: object) -> None:
        """Send it; the answer is streamed when `more` says so."""
        asked = body(prompt, **more)
        super().__init__(server, CHAT if "messages" in asked else COMPLETIONS, asked)

    def streamed(self) -> list[int]:
        """All token ids of a streamed answer of one choice."""
        return [t for e in self.events() for c in e["choices"] for t in c.get("token_ids") or ()]
