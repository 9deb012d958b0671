"""Left padding: where the rows of a batch begin by their attention masks, which must agree over time."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor
from transformers import PreTrainedModel


def row_inputs(model: PreTrainedModel, mask: Tensor | None, new: int) -> dict[str, Tensor]:
    """Arguments that a forward pass over the last `new` tokens takes for padded rows; none where no row is padded.

    They are the mask, and where the model takes them positions that count from each row's own beginning.

    Args:
        mask: of all tokens so far, the new ones included, [B, T].
    """
    if mask is None or (mask == 1).all():
        return {}
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        return {"attention_mask": mask}
    positions = (mask.long().cumsum(dim=-1) - 1).clamp_min(0)
    return {"attention_mask": mask, "position_ids": positions[:, mask.shape[1] - new :]}


def first_real(mask: object) -> Tensor | None:
    """Find the position at which each row begins, int64 [B], by an attention mask [B, T]; None if no row is padded.

    A row of padding alone has not begun: its text may come with a later chunk of the prompt.

    Raises:
        ValueError: the mask hides anything else.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        if (mask == 1).all():
            return None
        if ((mask == 0) | (mask == 1)).all() and (mask[:, 1:] >= mask[:, :-1]).all():
            return (mask == 0).sum(dim=1)
    raise ValueError(
        "A compressed cache takes rows that are padded on the left, or not at all, and no attention mask but that: "
        "tokenizer.padding_side = 'left', and attention_mask of shape [batch, tokens], 1 for text, 0 for padding."
    )


def check_padding(known: Tensor | None, now: Tensor | None, seen: int) -> None:
    """Check that a mask agrees with earlier ones on which tokens are padding: evictions went by those.

    Args:
        known, now: where rows begin by the earlier masks and by this one; None where no row is padded.

    Raises:
        ValueError: they disagree.
    """
    told = known if known is not None else now
    if not seen or told is None:
        return
    known = torch.zeros_like(told) if known is None else known
    now = torch.zeros_like(told) if now is None else now.to(known.device)
    if now.shape != known.shape or ((now != known) & (torch.minimum(now, known) < seen)).any():
        raise ValueError(
            "This attention_mask (or its absence) disagrees with the earlier ones on which of the tokens that the "
            "cache has seen are padding, and evictions went by those. Give the attention_mask of all tokens with "
            "every forward pass from the first on, and to whatever compresses a cache in between."
        )
