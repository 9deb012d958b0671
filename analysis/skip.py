"""Which layers to leave uncompressed: ALR per layer, a suggestion with its rule, and the plan as a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from analysis.errors import RunFileError
from analysis.files import content_of, record
from analysis.measures import alr, alr_chance
from analysis.run import Capture
from l2kv.spec import CompressionSpec

PLAN_VERSION = 1
# The loss of a policy against that of a random order, from Γ of low_norm: low and high order are one measurement.
_AGAINST_CHANCE = {"low_norm": lambda ratio: ratio, "high_norm": lambda ratio: 2 - ratio, "random": np.ones_like}


@dataclass(frozen=True, slots=True)
class LayerLoss:
    """ALR of a policy, by head and by layer. 0 is the ideal order, 1 a random one, 2 the worst."""

    by_head: np.ndarray  # [L, H] ALR / ALR of chance
    by_layer: np.ndarray  # [L] mean ALR of the heads / mean ALR of chance: heads count by what there is to lose
    paper: np.ndarray  # [L] mean ALR of the heads, in the paper's units (of this policy)


@dataclass(frozen=True, slots=True)
class SkipSuggestion:
    """Layers to keep whole, and the rule that chose them, in words."""

    layers: tuple[int, ...]
    rule: str


def layer_loss(capture: Capture, policy: str = "low_norm", *, leave_out: int = 0) -> LayerLoss:
    """What compressing each layer would lose by a policy, on the captured text. NaN where no head is defined."""
    low, chance = alr(capture, leave_out=leave_out), alr_chance(capture, leave_out=leave_out)
    defined = np.isfinite(low) & (chance > 0)
    by_head = np.full(low.shape, np.nan)
    by_head[defined] = _AGAINST_CHANCE[policy](low[defined] / chance[defined])
    loss, possible = np.where(defined, by_head * chance, 0.0).sum(axis=1), np.where(defined, chance, 0.0).sum(axis=1)
    heads = np.maximum(defined.sum(axis=1), 1)
    empty = ~defined.any(axis=1)
    by_layer = np.where(empty, np.nan, loss / np.where(empty, 1.0, possible))
    return LayerLoss(by_head, by_layer, np.where(empty, np.nan, loss / heads))


def suggest_skip_layers(
    capture: Capture, policy: str = "low_norm", *, threshold: float = 1.0, leave_out: int = 0
) -> SkipSuggestion:
    """Skip the layers in which the policy orders tokens no better than `threshold` times a random order.

    1 is the natural threshold: from there on the policy throws attention away faster than dice would.
    """
    loss = layer_loss(capture, policy, leave_out=leave_out).by_layer
    compressed = np.array([kind == "full" for kind in capture.layer_kinds])  # layers with a window never are
    layers = tuple(int(i) for i in np.flatnonzero(compressed & ~(loss < threshold)))  # undefined ones are skipped too
    undefined = int((compressed & np.isnan(loss)).sum())
    bar = "no less than a random order would" if threshold == 1 else f"at least {threshold:g} times what dice would"
    rule = (
        f"Skip every layer in which keeping by {policy.replace('_', ' ')} loses {bar}, both counted beyond what the "
        f"ideal order loses (ALR / chance ≥ {threshold:g}). Measured on this text of {capture.n_tokens} tokens, "
        "for the next token."
    )
    if undefined:
        rule += f" {undefined} of them because norms or attention give no order there."
    return SkipSuggestion(layers, rule)


@dataclass(frozen=True, slots=True)
class Plan:
    """A compression that was chosen for a model, as a file."""

    model: str
    spec: CompressionSpec
    note: str = ""

    def to_json(self) -> str:
        """The file's text."""
        return record("plan", PLAN_VERSION, {"model": self.model, "note": self.note, "spec": asdict(self.spec)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan, which may come from anyone. Raises RunFileError, with the reason."""
        content = content_of(text, "plan", PLAN_VERSION)
        try:
            given, model, note = content["spec"], content["model"], content.get("note", "")
            if not isinstance(model, str) or not isinstance(note, str):
                raise TypeError(f"model and note must be text, got {model!r:.60} and {note!r:.60}")
            return cls(model, CompressionSpec(**given | {"skip_layers": tuple(given.get("skip_layers", ()))}), note)
        except KeyError as error:
            raise RunFileError(f"This is not a plan that can be read: it has no {error}.") from error
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise RunFileError(f"This is not a plan that can be read: {str(error)[:200]}") from error
