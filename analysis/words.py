"""Words for numbers and lists of them, in sentences and tables. Knows no models and no plots."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def signed(value: float, decimals: int = 2) -> str:
    """Write a number with its sign, a true minus, and two decimals, as of a correlation, or more."""
    return "undefined" if np.isnan(value) else f"{value:+.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def counted(n: int, noun: str) -> str:
    """Count things: 1, "text" -> "1 text"; 3, "text" -> "3 texts"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def percent(share: float) -> str:
    """Write a share: 0.5 -> "50 %", which no line end parts."""
    return f"{100 * share:.0f}\N{NARROW NO-BREAK SPACE}%"


def capitalised(text: str) -> str:
    """Begin a text with a capital, and leave the others: "KeyDiff, half" stays."""
    return text[:1].upper() + text[1:]


def head_name(layer: int, kv_head: int, head: int) -> str:
    """Write the place of a query head: "L12 KV1 Q4"."""
    return f"L{layer} KV{kv_head} Q{head}"


def span(numbers: Iterable[int]) -> str:
    """Write the range of some numbers: "60 to 80", or "60" if they are equal."""
    least, most = min(numbers), max(numbers)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def ranges(numbers: Sequence[int]) -> str:
    """Write runs of numbers: [1, 2, 3, 7] -> "1-3, 7"."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{start}-{end}" if end > start else f"{start}" for start, end in zip(starts, ends, strict=True))


def layers_listed(layers: Sequence[int]) -> str:
    """Write a list of layers: "layer 3", "layers 0, 1", or "no layer"."""
    return f"layer{'s' * (len(layers) != 1)} {', '.join(map(str, layers))}" if layers else "no layer"


def duration(seconds: float) -> str:
    """Write a time as a person would say it: "4 s", "12 min", "2 h 5 min"."""
    if seconds < 99.5:
        return f"{max(seconds, 0):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def human_bytes(n: float) -> str:
    """Write a number of bytes: 1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(n) < 1024 or unit == "TiB":
            return f"{n:.0f} {unit}" if unit == "B" or n >= 100 else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError
