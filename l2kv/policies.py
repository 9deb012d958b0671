"""Eviction policies: a score for each cached pair, higher is kept. Knows tensors; knows no caches and no models.

A policy is a function of the pairs of some kv heads, and says what else it needs. Most score a pair once, when it
enters the cache: they cost nothing per step for the pairs that are there already. Some look at all pairs held when an
eviction is due; of these some need attention, which is then worked out for them, and for nobody else. To add one,
write it and enter it in `POLICIES`, or call `register_policy`: the cache, the command line, the app and the tests pick
it up from there, and the first line of its docstring is what a user reads about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from l2kv.errors import SpecError
from l2kv.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

SINKS = 4  # tokens that `streaming` keeps at the start
WINDOW = 32  # queries that `window` looks at
_POOL = 5  # neighbours that `window` smooths over


@dataclass(frozen=True, slots=True)
class Pairs:
    """Key/value pairs of some kv heads of a layer: the input of a policy."""

    keys: Tensor
    """[B, h, T, D], after rotary embedding and q/k norm. Scored again, as they are stored: rounded, [B, h, T, C]."""
    values: Tensor
    """[B, h, T, D], likewise."""
    positions: Tensor
    """True positions in the text, int64; broadcasts to [B, h, T]. Negative in the padding of a row."""
    layer_idx: int
    heads: tuple[int, ...]
    """Numbers of these h kv heads in the layer."""
    seed: int = 0
    directions: tuple[str, ...] | None = None
    """"low" or "high" for each of these heads, where the spec has directions."""
    filters: Tensor | None = None
    """[h, D], where the cache has filters."""
    special: Tensor | None = None
    """Whether each token is special or punctuation, bool that broadcasts to [B, h, T]; see `needs_token_ids`."""
    received: Tensor | None = None
    """Attention summed over all queries so far and the heads of the group, [B, h, T]; see `needs_received`."""
    last_rows: Tensor | None = None
    """Attention probabilities of the last w queries, and only of those, [B, h, G, w, T]; see `needs_rows`."""


@dataclass(frozen=True, slots=True)
class Policy:
    """An eviction policy: a score, its title, and what it needs.

    Raises:
        ValueError: the policy scores on arrival but needs attention, which is known only later; or nothing says what it
            keeps.
    """

    score: Callable[[Pairs], Tensor]
    """Pairs -> float32 scores that broadcast to [B, h, T], higher = keep."""
    title: str
    """Name that a user chooses it by."""
    on_arrival: bool = True
    """A pair is scored once, from itself alone; else all pairs held are scored at each eviction."""
    needs_directions: bool = False
    """`CompressionSpec.directions` must be given."""
    needs_filters: bool = False
    """`CompressedCache` must be given `filters` (see `l2kv.q_filters`)."""
    needs_token_ids: bool = False
    """Needs `Pairs.special`: `CompressedCache` must be given `special_ids` (see `l2kv.special_ids`)."""
    needs_received: bool = False
    """Needs `Pairs.received`: attention is worked out at every step."""
    needs_rows: int = 0
    """Needs `Pairs.last_rows` of so many queries: attention is worked out at every eviction."""
    ranks_whole_layer: bool = False
    """One order for all heads of a layer: they must have one target."""

    def __post_init__(self) -> None:
        if self.on_arrival and self.needs_attention:
            raise ValueError(f"{self.title}: attention is not known when a pair arrives; give on_arrival=False")
        if not self.about:
            raise ValueError(f"{self.title}: give its function a docstring, whose first line says what it keeps")

    @property
    def in_words(self) -> str:
        """Its title within a sentence or a table: "low norm", "KeyDiff"."""
        name = self.title.partition(" (")[0]
        return name if name[1:] != name[1:].lower() else name.lower()

    @property
    def about(self) -> str:
        """One line on what it keeps."""
        return (self.score.__doc__ or "").partition("\n")[0]

    @property
    def needs_attention(self) -> bool:
        """True if attention probabilities must be computed for it."""
        return self.needs_received or self.needs_rows > 0

    @property
    def needs_calibration(self) -> bool:
        """True if something must be measured on the model first."""
        return self.needs_directions or self.needs_filters


def low_norm(pairs: Pairs) -> Tensor:
    """Keep the keys of lowest L2 norm (the paper's rule)."""
    return -_norm(pairs.keys)


def high_norm(pairs: Pairs) -> Tensor:
    """Keep the keys of highest L2 norm (the mirror of the paper's rule)."""
    return _norm(pairs.keys)


def signed_norm(pairs: Pairs) -> Tensor:
    """Keep low norms in some heads and high norms in others, as measured on the model."""
    from l2kv.heads import numbers_on

    assert pairs.directions is not None
    sign = numbers_on(pairs.keys.device, tuple(1 if direction == "high" else -1 for direction in pairs.directions))
    return _norm(pairs.keys) * sign[:, None]


def random(pairs: Pairs) -> Tensor:
    """Keep tokens at random: what any rule must beat."""
    from l2kv.heads import numbers_on

    head = numbers_on(pairs.positions.device, pairs.heads)[:, None]
    # A hash, not a generator: the score of a token must not depend on how the text was cut into forward passes.
    mixed = _mix(
        _mix(_mix(pairs.positions + 1) + head + 1)
        + (pairs.layer_idx + 1) * 0x10001
        + (pairs.seed * 0x1000003 & _32_BITS)
    )
    return (mixed & 0xFFFFFF).float() / 2.0**24  # 24 bits are exact in float32


def streaming(pairs: Pairs) -> Tensor:
    """Keep the first four tokens and the most recent (StreamingLLM: Xiao et al., arXiv 2309.17453)."""
    # 2**30 swallows the position of a sink: they tie, and the earlier stays longer.
    return pairs.positions.float() + (pairs.positions < SINKS).float() * 2.0**30


def fastgen(pairs: Pairs) -> Tensor:
    """Keep special tokens, punctuation and the most recent (FastGen without attention: Ge et al., arXiv 2310.01801)."""
    assert pairs.special is not None
    # As in `streaming`, they tie, and the earlier stays longer.
    scores: Tensor = pairs.positions.float() + pairs.special.float() * 2.0**30
    return scores


def keydiff(pairs: Pairs) -> Tensor:
    """Keep the keys least like the mean direction of all keys held (KeyDiff: Park et al., arXiv 2504.15364)."""
    unit = _unit(pairs.keys)
    of_text = (pairs.positions >= 0)[..., None]  # what a row is padded with has no say in its mean
    return -(unit * _unit((unit * of_text).sum(dim=-2, keepdim=True))).sum(dim=-1)


def q_filters(pairs: Pairs) -> Tensor:
    """Keep the keys that point where the queries of the head do (Q-Filters: Godey et al., arXiv 2503.02812)."""
    assert pairs.filters is not None
    return (pairs.keys.float() * pairs.filters[:, None].float()).sum(dim=-1)


def accumulated(pairs: Pairs) -> Tensor:
    """Keep what received most attention so far (the heavy hitters of H2O: Zhang et al., arXiv 2306.14048)."""
    assert pairs.received is not None
    return pairs.received


def window(pairs: Pairs) -> Tensor:
    """Keep what the last 32 queries attend to, smoothed over neighbours (SnapKV: Li et al., arXiv 2404.14469)."""
    import torch

    assert pairs.last_rows is not None
    # A query older than all that is held sees nothing, and its row is 0 / 0.
    votes = pairs.last_rows.nan_to_num(0.0).sum(dim=(2, 3))
    positions = pairs.positions.expand_as(votes)
    # Slots are in no order, and neighbours are neighbours in the text.
    order = positions.argsort(dim=-1)
    votes, positions = votes.gather(-1, order), positions.gather(-1, order)
    # As in the paper, what came before the window is smoothed without the window's tokens, which vote for each other.
    recent = positions > positions[..., -1:] - WINDOW
    before, within = (
        torch.nn.functional.avg_pool1d(votes.masked_fill(others, 0.0), _POOL, stride=1, padding=_POOL // 2)
        for others in (recent, ~recent)
    )
    return torch.empty_like(votes).scatter_(-1, order, torch.where(recent, within, before))


def q_hitter(pairs: Pairs) -> Tensor:
    """Keep what received most attention and loses least when rounded (Q-Hitter: Zhang et al., MLSys 2024).

    The mean of the attention received and of one minus the error of rounding, each scaled to 0 to 1 over a head's
    tokens, as in the authors' code with its alpha of 0.5. There the error is that of rounding to 4 bits once; here it
    is what rounding is bound to lose, a share of a vector's range, which is the same again after the pair was rounded.
    There 7 % of the prompt's tokens are kept by attention alone; here none.
    """
    import torch

    assert pairs.received is not None
    real = pairs.positions.expand_as(pairs.received) >= 0

    def scaled(numbers: Tensor) -> Tensor:
        low = torch.where(real, numbers, torch.inf).amin(dim=-1, keepdim=True)
        span = torch.where(real, numbers, -torch.inf).amax(dim=-1, keepdim=True) - low
        return torch.where(span > 0, (numbers - low) / span, 0.0)

    errors = [scaled(x.float().amax(dim=-1) - x.float().amin(dim=-1)) for x in (pairs.keys, pairs.values)]
    scores: Tensor = scaled(pairs.received) - (errors[0] + errors[1]) / 2
    return scores


def last_query(pairs: Pairs) -> Tensor:
    """Keep what the last query attends to, by the mean over a layer's heads (TOVA: Oren et al., arXiv 2401.06104)."""
    assert pairs.last_rows is not None
    return pairs.last_rows[:, :, :, -1].mean(dim=(1, 2))[:, None]


def _norm(keys: Tensor) -> Tensor:
    norms: Tensor = keys.float().norm(dim=-1)  # float32: of bfloat16 norms nearly all tie
    return norms


def _unit(vectors: Tensor) -> Tensor:
    return vectors.float() / _norm(vectors)[..., None].clamp_min(1e-12)


_32_BITS = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash (C. Wellons' lowbias32) on int64 tensors."""
    x = x & _32_BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _32_BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)


OF_FILE = re.compile(r"(([^\W\d]\w*)\.py:([^\W\d]\w*))@[0-9a-f]{8}")
"""Name of a policy that `l2kv.load_policy` loads: file and function, and a digest of the file's bytes."""


class Policies(Registry[Policy]):
    """Policies by name, those of files included: unless its file is loaded, such a policy can be named, and not run.

    So a record of what was measured with it can be read by those who do not have the file, or do not trust it.
    """

    def __getitem__(self, name: str) -> Policy:
        return super().__getitem__(name) if name in self._entries or not OF_FILE.fullmatch(name) else _unscored(name)

    def _may_be_called(self, name: str) -> bool:
        return super()._may_be_called(name) or OF_FILE.fullmatch(name) is not None


def not_loaded(name: str) -> SpecError:
    """Error of a policy that its file must be loaded for."""
    where = name.partition("@")[0]
    return SpecError(
        f"The policy {name} is not loaded: give {where} as a policy, or call l2kv.load_policy({where!r}). A file that "
        "was changed since is another policy."
    )


def _unscored(name: str) -> Policy:
    def score(pairs: Pairs) -> Tensor:
        """Keep what a file says that is not loaded."""
        raise not_loaded(name)

    return Policy(score, name.partition("@")[0], on_arrival=False)


POLICIES = Policies(
    "policy",
    SpecError,
    {
        "low_norm": Policy(low_norm, "Low norm (the paper)"),
        "high_norm": Policy(high_norm, "High norm (its mirror)"),
        "signed_norm": Policy(signed_norm, "Low or high norm by head", needs_directions=True),
        "random": Policy(random, "Random"),
        "streaming": Policy(streaming, "First and recent (StreamingLLM)"),
        "fastgen": Policy(fastgen, "Special tokens, punctuation and recent (FastGen)", needs_token_ids=True),
        "keydiff": Policy(keydiff, "KeyDiff (unlike the other keys)", on_arrival=False),
        "q_filters": Policy(q_filters, "Along the queries (Q-Filters)", needs_filters=True),
        "accumulated": Policy(accumulated, "Most attention so far (H2O)", on_arrival=False, needs_received=True),
        "q_hitter": Policy(
            q_hitter, "Attention and ease of rounding (Q-Hitter)", on_arrival=False, needs_received=True
        ),
        "window": Policy(window, "Attention of the last 32 queries (SnapKV)", on_arrival=False, needs_rows=WINDOW),
        "last_query": Policy(
            last_query, "Attention of the last query (TOVA)", on_arrival=False, needs_rows=1, ranks_whole_layer=True
        ),
    },
)
"""Eviction policies by name, as `CompressionSpec.policy` has it."""


def register_policy(
    name: str,
    score: Callable[[Pairs], Tensor],
    *,
    title: str,
    on_arrival: bool = True,
    needs_directions: bool = False,
    needs_filters: bool = False,
    needs_token_ids: bool = False,
    needs_received: bool = False,
    needs_rows: int = 0,
    ranks_whole_layer: bool = False,
) -> Policy:
    """Register an eviction policy, so that specs can name it; the arguments are the fields of `Policy`.

    Raises:
        ValueError: the name is taken or no identifier, or as `Policy`.
    """
    policy = Policy(
        score,
        title,
        on_arrival=on_arrival,
        needs_directions=needs_directions,
        needs_filters=needs_filters,
        needs_token_ids=needs_token_ids,
        needs_received=needs_received,
        needs_rows=needs_rows,
        ranks_whole_layer=ranks_whole_layer,
    )
    return POLICIES.register(name, policy)
