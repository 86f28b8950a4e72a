"""Make the benchmark's model: little to compute, much KV to move; one for every framework.

`python -m serving.model FOLDER`: 16 layers of 2 heads of 256 over a hidden size of 128,
float32. A token's KV is 64 KiB and a page of 64 tokens is 256 KiB per layer, as Llama-3-8B's is;
a prompt of 4096 tokens moves 256 MiB. Random weights, so any wrong page changes the text.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_model import VOCABULARY, tokenizer

LAYERS, HEADS, HEAD_DIM, HIDDEN = 16, 2, 256, 128
#: Keys and values, float32.
BYTES_PER_TOKEN = 2 * LAYERS * HEADS * HEAD_DIM * 4
POSITIONS = 16384


def make(folder: Path) -> None:
    """Write the model and its tokenizer into `folder`, which appears complete or not at all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        # Attention's work is the product of layers, query heads and their width, as KV's size is:
        # as many query heads as KV heads is the least work for 64 KiB a token.
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.15,  # see tiny_model.py: rounding must never decide a greedy token
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float32).eval()
    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(unfinished)
    tokenizer().save_pretrained(unfinished)
    unfinished.rename(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not target.exists():
        make(target)
