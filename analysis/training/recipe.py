"""What is trained and how, as values."""

from __future__ import annotations

from dataclasses import dataclass, field

from analysis.errors import UserError


@dataclass(frozen=True, slots=True)
class Shape:
    """A stock Llama: grouped-query attention, SwiGLU, tied embeddings, no q/k norm."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab_size: int = 4096


SHAPES = {
    "tiny": Shape(layers=2, width=32, heads=2, kv_heads=1, head_dim=16, mlp=64, vocab_size=300),
    "5m": Shape(layers=6, width=256, heads=8, kv_heads=4, head_dim=32, mlp=640),
    "19m": Shape(layers=10, width=384, heads=8, kv_heads=4, head_dim=64, mlp=1024),
}
"""5m is for two CPU cores, 19m for a GPU, tiny to try the command."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """AdamW on all weights, also norms and embeddings: the decay there is part of how attention sinks come to be."""

    shape: Shape = field(default=SHAPES["19m"])
    length: int = 2048
    """Tokens of a sequence, <s> included."""
    batch: int = 32
    """Sequences a step."""
    minutes: float | None = 20.0
    """Time to train for, None: as many as the steps take."""
    steps: int | None = None
    """Steps to train for, None: as many as the time allows."""
    learning_rate: float = 1.5e-3
    decay: float = 0.25
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    warmup: int = 100
    """Steps over which the learning rate rises."""
    flat: float = 0.8
    """Share of the training after which the learning rate falls, in a line to 0."""
    synthetic: float = 0.15
    """Share of the sequences that are made of passkeys, needles and copies."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("length", 64), ("batch", 1), ("warmup", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be {least} or more, got {getattr(self, name)}")
        for name, low, high in (("learning_rate", 0, 1), ("decay", 0, 10), ("synthetic", 0, 1), ("flat", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if self.minutes is None and self.steps is None:
            raise UserError("a training needs an end: give minutes, or steps")
        for name in ("minutes", "steps"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be more than 0, got {value}")

    def progress(self, step: int, seconds: float) -> float:
        """How much of the training is over, 0 to 1, by steps or by time, whichever is ahead."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def rate(self, step: int, progress: float) -> float:
        """The learning rate of a step: up, flat, and down to 0."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        falling = min(1.0, (1.0 - progress) / (1.0 - self.flat)) if self.flat < 1 else 1.0
        return self.learning_rate * min(rising, falling)
