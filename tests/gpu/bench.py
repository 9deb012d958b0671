"""`make gpu-bench`, the long form of `gpu-check`: a longer capture, batches of several sizes, a part of a 70B model."""

from __future__ import annotations

from functools import partial

from tests.gpu.check import EAGER, FUSED, GRAPHED, STATIC, Section, bandwidth, captures, decoding, environment, main
from tests.gpu.shapes import LLAMA_8B, LLAMA_70B_PART, SMOLLM2

_KEPT_LITTLE = {name: way for name, way in (EAGER | GRAPHED | FUSED).items() if "0.1" in name or name == "DynamicCache"}
SECTIONS: dict[str, Section] = {
    "environment": environment,
    "bandwidth": bandwidth,
    "capture 128k": partial(captures, shape=LLAMA_8B, n_tokens=131072, torch_repeats=0),
    **{
        f"decoding 8B 32k x {rows}": partial(decoding, shape=LLAMA_8B, n_tokens=32768, rows=rows, ways=_KEPT_LITTLE)
        for rows in (1, 2, 4, 8, 12)
    },
    **{
        f"decoding SmolLM2 16k x {rows}": partial(
            decoding, shape=SMOLLM2, n_tokens=16384, rows=rows, ways=GRAPHED | FUSED | STATIC
        )
        for rows in (1, 32)
    },
    "decoding 70B part 32k x 8": partial(
        decoding, shape=LLAMA_70B_PART, n_tokens=32768, rows=8, ways=GRAPHED | FUSED | EAGER | STATIC
    ),
}

if __name__ == "__main__":
    main(SECTIONS, limit=1800)
