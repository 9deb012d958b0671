"""Compress arrays for a file, and read them back from an untrusted one. Knows numpy and zlib; knows no run.

Attention has heavy tails: beside a sink of 0.99 a row may hold values of 1e-3 and of 1e-12, and the order of all of
them counts. Equal steps make most of such a row one tie; so do steps of the square root. Here a row's steps are equal
in the tenth root, from its least value to its third largest, and the two largest are kept as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

ROOT = 10  # nearly logarithmic, with finer steps where the values are large and errors count


def code_type(levels: int) -> type[np.uint8] | type[np.uint16]:
    """Dtype that holds the codes of so many levels."""
    return np.uint8 if levels + 2 < 256 else np.uint16


def quantised(values: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise rows of values. Order is preserved, and so are zeros and equal values.

    Args:
        values: [..., n] float32, from 0.
        levels: how many different values a row may have beside 0 and its two largest, from 2.

    Returns:
        codes [..., n], uint8 or uint16: 0 is 0, 1 to `levels` are steps, then come the second largest and the largest;
        ends [..., 4] float32, of different values above 0: the least, the third largest, the second, the largest. What
        a row has too few for is 0.

    Raises:
        ValueError: a value is no number, or below 0.
    """
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("attention holds values that no run can have")
    codes: np.ndarray = np.zeros(values.shape, code_type(levels))
    ends = np.zeros((*values.shape[:-1], 4), np.float32)
    for row, code, end in zip(values, codes, ends, strict=True):  # a part at a time: float64 is large
        row = row.astype(np.float32)
        top = row.max(axis=-1, keepdims=True, initial=0)
        second = row.max(axis=-1, keepdims=True, initial=0, where=row < top)
        others = (row > 0) & (row < second)
        high = row.max(axis=-1, keepdims=True, initial=0, where=others)
        low = np.minimum(row.min(axis=-1, keepdims=True, initial=np.inf, where=others), high)
        end[:] = np.concatenate([low, high, second, top], axis=-1)
        first, last, root = (np.float64(values) ** (1 / ROOT) for values in (low, high, row))
        steps = np.rint((root - first) / np.where(last > first, last - first, 1) * (levels - 1))
        code[:] = np.select([row == 0, row == top, row == second], [0, levels + 2, levels + 1], 1 + steps)
    return codes, ends


def restored(codes: np.ndarray, ends: np.ndarray, levels: int) -> np.ndarray:
    """Restore the values [..., n] float32 of `quantised`; quantising them again changes nothing.

    Raises:
        ValueError: these are no codes, or no ends.
    """
    if ends.dtype != np.float32 or ends.shape != (*codes.shape[:-1], 4):
        raise ValueError(f"has ends of type {ends.dtype} and shape {ends.shape}")
    if codes.max(initial=0) > levels + 2 or not (np.isfinite(ends).all() and (ends >= 0).all()):
        raise ValueError("holds values that no run can have")
    if (np.diff(ends) < 0).any():
        raise ValueError("has ends in no order")
    values = np.empty(codes.shape, np.float32)
    for row, code, end in zip(values, codes, ends, strict=True):
        low, high, second, top = np.moveaxis(end, -1, 0)[..., None]
        first, last = (np.float64(values) ** (1 / ROOT) for values in (low, high))
        root = first + (code - 1.0) * ((last - first) / (levels - 1))
        np.clip(root**ROOT, low, high, out=row, casting="same_kind")
        for step, value in {1: low, levels: high, levels + 1: second, levels + 2: top, 0: 0}.items():
            np.copyto(row, value, where=code == step)  # exactly
    return values


def deflated(values: np.ndarray, *, along: int | None = None) -> np.ndarray:
    """Compress the bytes of an array: [bytes] uint8.

    Args:
        along: an axis along which neighbours are alike: then their differences are compressed. Of whole numbers only.
    """
    if along is not None:
        values = np.diff(values, axis=along, prepend=values.dtype.type(0))
    planes = np.ascontiguousarray(values).reshape(-1, 1).view(np.uint8).T  # first all first bytes: they are alike
    return np.frombuffer(zlib.compress(planes.tobytes()), np.uint8)


def inflated(stream: np.ndarray, shape: Sequence[int], dtype: type, *, along: int | None = None) -> np.ndarray:
    """Restore an array that was `deflated`; never unpacks more than an array of this shape takes.

    Raises:
        ValueError: the stream holds anything else.
    """
    size = int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize
    unpacking = zlib.decompressobj()
    try:
        data = unpacking.decompress(stream.tobytes(), size + 1)  # one more than is right; 0 would be no limit
    except zlib.error as error:
        raise ValueError(f"cannot be unpacked: {error}") from error
    if len(data) != size or not unpacking.eof or unpacking.unused_data:
        raise ValueError(f"is not of shape {tuple(shape)} when unpacked")
    planes = np.frombuffer(data, np.uint8).reshape(np.dtype(dtype).itemsize, -1)
    values: np.ndarray = np.ascontiguousarray(planes.T).view(dtype).reshape(shape)
    return values if along is None else np.add.accumulate(values, axis=along, dtype=dtype)
