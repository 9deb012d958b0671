"""How well a model predicts and retrieves, with the full cache and with a compressed one."""

from __future__ import annotations

import math

import torch

from analysis.memory import memory_errors
from analysis.models import LoadedModel
from analysis.tokens import tokenize


@torch.inference_mode()
def bits_per_byte(loaded: LoadedModel, text: str, *, context: int | None = None) -> float:
    """Bits that the model needs for each byte of a text, in windows of `context` tokens that start afresh.

    Args:
        context: tokens a window, its first special token included; the positions of the model, if not given.

    Raises:
        TextError: empty, or no valid Unicode.
    """
    tokens = tokenize(loaded.tokenizer, text).ids
    prefix = loaded.tokenizer.bos_token_id
    ids = torch.from_numpy(tokens[1:] if prefix is not None and tokens[0] == prefix else tokens)
    start = ids.new_tensor([prefix if prefix is not None else int(ids[0])])
    size = (context or loaded.config.max_position_embeddings) - 1
    nats = 0.0
    with memory_errors():
        for window in ids.split(size):
            inputs = torch.cat([start, window])[None].to(loaded.device)
            logits = loaded.model(inputs[:, :-1], use_cache=False).logits[0].float()
            nats += torch.nn.functional.cross_entropy(logits, inputs[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode("utf-8"))
