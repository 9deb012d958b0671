"""Identity of a model: a digest of its weights and vocabulary."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from analysis.models.load import LoadedModel


def digest_of(loaded: LoadedModel) -> str:
    """Compute a hexadecimal digest of the vocabulary and of every weight's name, dtype, shape and 64 of its numbers.

    64 numbers tell a model from its fine-tuned versions; reading all of a large model would take as long as a text.
    """
    digest = hashlib.sha256(json.dumps(loaded.tokenizer.get_vocab(), sort_keys=True).encode())
    for name, weight in loaded.model.state_dict().items():
        flat = weight.detach().flatten()
        some = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + some.tobytes())
    return digest.hexdigest()
