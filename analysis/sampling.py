"""How the next token is drawn from a model's prediction. Reading the settings needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import SettingsError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn from the model's prediction.

    All columns draw by the same random numbers, so they part only where their predictions do.
    """

    temperature: float = 0.0
    """0 takes the most probable token."""
    top_p: float = 1.0
    """Only the most probable tokens that make up this share are drawn from."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 10:
            raise SettingsError(f"temperature must be from 0 to 10, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise SettingsError(f"top_p must be above 0 and at most 1, got {self.top_p:g}")

    def told(self) -> str:
        """Write the settings as a sentence; empty where the most probable token is taken."""
        if not self.temperature:
            return ""
        return f"Sampled: temperature {self.temperature:g}, top-p {self.top_p:g}, seed {self.seed}."

    def draw(self, logits: Tensor, step: int) -> int:
        """Draw a token by its logits [vocabulary]; the same step draws by the same random number."""
        if not self.temperature:
            return int(logits.argmax())
        import torch

        share, order = torch.softmax(logits.double() / self.temperature, -1).sort(descending=True, stable=True)
        below = share.cumsum(-1)
        share = torch.where(below - share < self.top_p, share, 0.0)
        below = share.cumsum(-1)
        number = np.random.default_rng((self.seed, step)).random() * float(below[-1])
        return int(order[int(torch.searchsorted(below, number, right=True).clamp(max=len(order) - 1))])


GREEDY = Sampling()
