"""Rows of a batch that are padded on the left: where they begin, as attention masks tell, which must not disagree."""

from __future__ import annotations

import torch
from torch import Tensor


def first_real(mask: object) -> Tensor | None:
    """Where each row begins, int64 [B], from an attention mask [B, T], 0 for padding; None where no row is padded.

    A row that is all padding has not begun yet: its text may come with a later chunk of the prompt.

    Raises:
        ValueError: it hides anything else.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and (mask == 1).all()):
        return None
    told = isinstance(mask, Tensor) and mask.dim() == 2 and ((mask == 0) | (mask == 1)).all()
    if not told or not (mask[:, 1:] >= mask[:, :-1]).all():
        raise ValueError(
            "A compressed cache takes rows that are padded on the left, or not at all, and no attention mask but that: "
            "tokenizer.padding_side = 'left', and attention_mask of shape [batch, tokens], 1 for text, 0 for padding."
        )
    return (mask == 0).sum(dim=1)


def check_padding(known: Tensor | None, now: Tensor | None, seen: int) -> None:
    """What was padding among the tokens seen stays padding, and what was text, text: by that it was evicted, or kept.

    Args:
        known, now: where the rows begin, as it was told before and is now; None where no row is padded.

    Raises:
        ValueError: they disagree.
    """
    if not seen or (known is None and now is None):
        return
    known = torch.zeros_like(now) if known is None else known
    now = torch.zeros_like(known) if now is None else now.to(known.device)
    if now.shape != known.shape or ((now != known) & (torch.minimum(now, known) < seen)).any():
        raise ValueError(
            "This attention_mask (or that there is none) says otherwise than the ones before which of the tokens that "
            "the cache has seen are padding, and the cache went by those. Give the attention_mask of all tokens with "
            "every forward pass from the first on, and to whatever compresses a cache in between."
        )
