"""Triton kernels for what torch has no call for, and the one switch between them and the torch code beside them.

Each kernel has a torch path that it is held against. Without a GPU both are the same to a caller: the kernels then run
in Triton's interpreter, for tests. Triton is imported when a kernel is first used.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

SWITCH = "L2KV_KERNELS"
"""Environment variable that chooses: `triton`, `torch`, or by default Triton on a GPU that has it."""


def enabled(device: torch.device) -> bool:
    """Tell whether kernels are to be used for tensors on a device.

    Raises:
        RuntimeError: the environment asks for Triton where it is missing, or for what is neither.
    """
    chosen = os.environ.get(SWITCH, "")
    if chosen not in ("", "torch", "triton"):
        raise RuntimeError(f"{SWITCH} must be torch or triton, got {chosen!r}.")
    if chosen == "triton" and not _installed():
        raise RuntimeError(f"{SWITCH} is triton, which is not installed: pip install triton")
    if chosen == "triton":
        return device.type == "cuda" or bool(os.environ.get("TRITON_INTERPRET"))
    return chosen == "" and device.type == "cuda" and _installed()


@cache
def _installed() -> bool:
    return find_spec("triton") is not None
