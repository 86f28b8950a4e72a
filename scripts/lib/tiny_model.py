"""Make a tiny Llama with random weights and its tokenizer, without any download.

`python scripts/lib/tiny_model.py FOLDER` writes 2.6 million parameters: 4 layers, 4 heads over
2 KV heads of 64, float32, so a token's KV is 4 KiB. Ten seconds, nearly all of it imports.
"""

from __future__ import annotations

import string
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_TOKENS = 16384
VOCABULARY = 512
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def make(folder: Path) -> None:
    """Write the model and its tokenizer into `folder`, which appears complete or not at all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # Ten times the usual spread: logits lie far apart, so rounding never decides a greedy
        # token, and each depends on the whole context, so one wrong KV page changes the text.
        initializer_range=0.15,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.float32).eval()

    unfinished = folder.with_name(folder.name + ".unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(unfinished)
    tokenizer().save_pretrained(unfinished)
    unfinished.rename(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token of its own, so no text is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [
        "pages of keys and values move from the prefill server to the decode server " * 4,
        "a hold ends when every reader has released it, or when its time is over " * 4,
        string.printable,
    ]
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",  # noqa: S106 - a token of text, not a secret
        bos_token="<s>",  # noqa: S106 - likewise
        eos_token="</s>",  # noqa: S106 - likewise
        model_max_length=MAX_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if not target.exists():
        make(target)
