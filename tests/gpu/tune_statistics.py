"""Time the kernels of attention statistics with blocks of several sizes: `python -m tests.gpu.tune_statistics`.

Teraflops per second of the products of queries and keys, which both kernels work out; with a profile of each kernel.
"""

from __future__ import annotations

import json
from unittest.mock import patch

import torch
import triton

from l2kv.kernels import statistics

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # Llama-3-8B
BLOCKS = [  # tile, keys, queries, warps, stages
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (128, 64, 64, 8, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 128, 8, 3),
    (256, 64, 64, 8, 3),
    (64, 64, 64, 4, 3),
]


def measure(n: int, blocks: tuple[int, ...]) -> dict[str, float]:
    """Milliseconds and teraflops per second of each kernel and of the whole call, at the length n."""
    query = torch.randn(1, n, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    key = torch.randn(1, n, KV_HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16).transpose(1, 2)

    def call() -> None:
        statistics.attention_statistics(query, key, width=-(-n // 128), options={})

    with patch.object(statistics._Blocks, "of", lambda *_: statistics._Blocks(*blocks)):
        call()
        whole = triton.testing.do_bench(call, warmup=10, rep=60)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    flops = HEADS * n * n * HEAD_DIM  # half of 2 * n * n * D: causal
    found = {"ms": whole, "tflops": 2 * flops / whole / 1e9}
    for event in profile.key_averages():
        for kernel in ("_log_sums_kernel", "_rows_kernel"):
            if kernel in event.key:
                found[kernel] = flops / event.device_time_total / 1e6
    return found


def main() -> None:
    for n in (8192, 32768):
        for blocks in BLOCKS:
            try:
                found = measure(n, blocks)
                print(json.dumps({"n": n, "blocks": blocks} | {k: round(v, 2) for k, v in found.items()}), flush=True)
            except Exception as error:  # too much shared memory, say: the next may do
                print(json.dumps({"n": n, "blocks": blocks, "error": str(error)[:200]}), flush=True)


if __name__ == "__main__":
    main()
