"""One request's KV, as the connector would move it: a model's shape, pages, pieces. Pure.

The descriptors come from the connector's own `layout` and `plan`; addresses are offsets in a
buffer that holds one cache and nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

from mooncake_engine.errors import ConfigError

from mooncake_connector.bench.base import Transfer
from mooncake_connector.bench.churn import pages_after_churn
from mooncake_connector.layout import LayerLayout, PieceTable, layer_layout
from mooncake_connector.plan import transfers


class Model(NamedTuple):
    """What one token's KV is made of.

    Attributes:
        layers: Each with a cache of its own.
        kv_heads: Shared out over the tensor-parallel ranks.
        head_elements: Of K and V together; of the latent, where the model has one.
        latent: MLA: every rank holds the whole.
        itemsize: Bytes of an element.
    """

    layers: int
    kv_heads: int
    head_elements: int
    latent: bool = False
    itemsize: int = 2

    def heads_of_a_rank(self, tp_size: int) -> int:
        """At least one: with more ranks than heads some ranks hold the same."""
        return self.kv_heads if self.latent else max(1, self.kv_heads // tp_size)

    def token_bytes(self, tp_size: int) -> int:
        """Bytes of one token in all layers of one rank."""
        return self.layers * self.heads_of_a_rank(tp_size) * self.head_elements * self.itemsize


#: From the models' config.json: num_hidden_layers, num_key_value_heads, 2 x head_dim in bfloat16;
#: for MLA kv_lora_rank 512 + qk_rope_head_dim 64.
MODELS = {
    "llama-3-8b": Model(layers=32, kv_heads=8, head_elements=2 * 128),
    "qwen3-32b": Model(layers=64, kv_heads=8, head_elements=2 * 128),
    "deepseek-v3": Model(layers=61, kv_heads=1, head_elements=512 + 64, latent=True),
}

#: How a framework puts a layer: vLLM with a page's K and V together, SGLang with K and V in
#: memory of their own, vLLM with heads outside of pages (its LHBNC).
ARRANGEMENTS = ("vllm", "sglang", "heads")


class Request(NamedTuple):
    """One request on one rank."""

    model: str
    tokens: int
    page_size: int
    tp_size: int
    arrangement: str


def kv_transfer(request: Request, op: str, buffer: int, seed: int) -> Transfer:
    """Every page of the request, from where one side's pool put it to where the other's did.

    Args:
        request: What to move.
        op: "read": the initiator is decode, the target prefill; "write": the other way round.
        buffer: Bytes of each side's cache, all layers.
        seed: Of both sides' churn; each has its own.

    Raises:
        ConfigError: The cache cannot hold the request.
    """
    wanted = -(-request.tokens // request.page_size)
    page_bytes = MODELS[request.model].token_bytes(request.tp_size) * request.page_size
    capacity = buffer // page_bytes
    if capacity <= wanted:
        raise ConfigError(
            f"{request.tokens} tokens of {request.model} in pages of {request.page_size} take "
            f"{wanted} pages of {page_bytes} bytes; the buffer of {buffer} bytes has room for "
            f"{capacity}, one of which is never used; raise --total_buffer_size or lower --tokens"
        )
    prefill, decode = (
        pages_after_churn(capacity, wanted, request.page_size, seed + side, generates=bool(side))
        for side in (0, 1)
    )
    table = PieceTable(_cache(request, capacity))
    local, remote = (decode, prefill) if op == "read" else (prefill, decode)
    return Transfer(op, *transfers(table, table, local, remote))


def _cache(request: Request, pages: int) -> list[LayerLayout]:
    """The layers one behind the other, laid out as the framework does."""
    model = MODELS[request.model]
    heads = model.heads_of_a_rank(request.tp_size)
    parts, elements = 1, model.head_elements
    if request.arrangement == "sglang" and not model.latent:
        parts, elements = 2, elements // 2  # K's memory, then V's
    shape = (pages, heads, request.page_size, elements)
    page = heads * request.page_size * elements
    strides = (page, request.page_size * elements, elements, 1)
    if request.arrangement == "heads":
        strides = (request.page_size * elements, pages * request.page_size * elements, elements, 1)
    return [
        layer_layout(part * pages * page * model.itemsize, shape, strides, model.itemsize, pages)
        for part in range(model.layers * parts)
    ]
