"""Parts: the pairs of kv heads that hold the same number each, as policies and attention see them. Knows no specs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from l2kv.probabilities import attention_scores, in_blocks
from l2kv.storage.formats import Format


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs of kv heads that hold the same number each, in storage order."""

    heads: tuple[int, ...]
    keys: Tensor  # [B, h, held, D]
    values: Tensor  # [B, h, held, D]

    @property
    def held(self) -> int:
        """Number of pairs that each of its heads holds."""
        return self.keys.shape[2]

    def scores(self, query: Tensor, scale: float) -> Tensor:
        """Compute scale * query @ key for queries [B, h * G, q, D]: float32 [B, h * G, q, held]."""
        return attention_scores(query, in_blocks(self.keys), (len(self.heads), self.held), scale)


@dataclass(frozen=True)
class CodedPart:
    """As `Part`, of pairs that are stored by formats; the latest are there as they came, too, for attention to take."""

    heads: tuple[int, ...]
    rows: tuple[Tensor, Tensor]  # of keys and of values, [B, h, held, ...]
    formats: tuple[Format, Format]
    latest: tuple[Tensor, Tensor]  # keys and values, [B, h, r, D], by position
    positions: Tensor  # [B, h, held]

    @property
    def held(self) -> int:
        """Number of pairs that each of its heads holds."""
        return self.rows[0].shape[2]

    @property
    def keys(self) -> Tensor:
        """Stored channels of all keys, float32 [B, h, held, C]: a copy."""
        return self.formats[0].decode(self.rows[0])

    @property
    def values(self) -> Tensor:
        """All values, float32 [B, h, held, D]: a copy."""
        return self.formats[1].decode(self.rows[1])

    @cached_property
    def _slots(self) -> Tensor:
        """Slots of the latest pairs."""
        return slots_of_latest(self.positions, self.latest[0].shape[2])

    def scores(self, query: Tensor, scale: float) -> Tensor:
        """As `Part.scores`. Queries meet stored keys in the channels that these have."""
        heads = len(self.heads)
        grouped = query.unflatten(1, (heads, -1)).flatten(2, 3)  # [B, h, G * q, D]
        rows, latest = in_blocks(self.rows[0], self.formats[0].decode), in_blocks(self.latest[0])
        scores = attention_scores(self.formats[0].narrow(grouped), rows, (heads, self.held), scale)
        slots = self._slots[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        scores.scatter_(-1, slots, attention_scores(grouped, latest, (heads, slots.shape[-1]), scale))
        return scores.view(*query.shape[:3], self.held)

    def mixed(self, probabilities: Tensor) -> Tensor:
        """Compute probabilities @ values for probabilities [B, h * G, q, held]: float32 [B, h * G, q, D]."""
        grouped = probabilities.unflatten(1, (len(self.heads), -1)).flatten(2, 3)
        slots = self._slots[:, :, None].expand(-1, -1, grouped.shape[2], -1)
        mixed: Tensor = grouped.gather(-1, slots) @ self.latest[1].float()
        grouped, start = grouped.scatter(-1, slots, 0.0), 0
        for some in in_blocks(self.rows[1], self.formats[1].decode):
            mixed += grouped[..., start : start + some.shape[2]] @ some
            start += some.shape[2]
        mixed = mixed.unflatten(2, (-1, probabilities.shape[2])).flatten(1, 2)
        return mixed


def slots_of_latest(positions: Tensor, n: int) -> Tensor:
    """Find the slots [B, h, n] of the n latest of pairs at `positions` [B, h, held], by position."""
    return positions.topk(n, dim=-1).indices.flip(-1)


def take_slots(vectors: Tensor, slots: Tensor) -> Tensor:
    """Take the `slots` [B, h, n] of vectors [B, h, T, D]: [B, h, n, D]."""
    return vectors.gather(2, slots[..., None].expand(*slots.shape, vectors.shape[-1]))
