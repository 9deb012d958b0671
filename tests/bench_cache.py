"""`make bench`: what a compressed cache costs and saves beside transformers' own, as ratios measured in one run.

Shape: 30 layers, 9 query and 3 kv heads, 576 wide, float32, random weights (right for time and memory, never for
quality). Ways take turns, so that a machine that slows down slows all of them; each figure is the median. Peaks of
memory are measured in processes of their own. OMP_NUM_THREADS=1 in the environment measures one thread.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

from tests.support.measuring import peak_bytes, seconds

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 9, 3, 64, 4096
LENGTHS = (1024, 4096, 16384)
NEW_TOKENS = 48


def shape(max_positions: int):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=max_positions,
    )


def compression() -> None:
    """One compression of one layer, against the paper's way: sort all norms, then gather all keys and values."""
    import torch

    from l2kv import CompressionSpec
    from l2kv.layer import CompressedLayer

    def paper(keys, values, kept):
        order = keys.norm(p=2, dim=-1).argsort(dim=-1)[..., None].expand(-1, -1, -1, keys.shape[-1])
        return [x.gather(2, order)[:, :, :kept].contiguous() for x in (keys, values)]

    def ours(keys, values, spec):
        layer = CompressedLayer(spec, 0)
        layer.update(keys, values)
        layer.evict_now()

    print(f"One compression of a layer ({KV_HEADS} kv heads of {HEAD_DIM}):")
    for n in (4096, 32768):
        keys, values = (torch.randn(1, KV_HEADS, n, HEAD_DIM) for _ in range(2))
        for ratio in (0.5, 0.1):
            spec = CompressionSpec(keep_ratio=ratio)
            ways = [lambda: paper(keys, values, int(n * ratio)), lambda: ours(keys, values, spec)]  # noqa: B023
            times: list[list[float]] = [[], []]
            for _ in range(15):
                for way, column in zip(ways, times, strict=True):
                    way(), way()  # not timed: memory that the other way gave back is fetched page by page
                    column.append(seconds(way))
            theirs, mine = (statistics.median(column) * 1e3 for column in times)
            print(f"  {n:6} tokens, keep {ratio}: {theirs:6.2f} ms, ours {mine:5.2f} ms: 1/{theirs / mine:.1f}")


def decoding() -> None:
    """Decoding tokens a second, beside DynamicCache and StaticCache."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache

    from l2kv import CompressedCache, CompressionSpec, compressible
    from l2kv.cache import cache_nbytes

    torch.manual_seed(0)
    config = shape(max(LENGTHS) + 1024)
    model = LlamaForCausalLM(config).eval()

    def filled(make, n):
        """A cache after n tokens, without running the model on them: random pairs, as a prompt would leave them."""
        cache = make()
        pairs = torch.randn(1, KV_HEADS, n, HEAD_DIM), torch.randn(1, KV_HEADS, n, HEAD_DIM)
        for i in range(LAYERS):
            if isinstance(cache, CompressedCache):
                cache.layers[i].update(pairs[0].clone(), pairs[1].clone())
                cache.layers[i].unattended = False
                cache.layers[i].evict_now()
            else:
                cache.update(pairs[0].clone(), pairs[1].clone(), i)
        return cache

    def compressed(**options):
        return lambda: CompressedCache(config, CompressionSpec(**options))

    def head_plan(ratio):
        return {(i, h): ratio * (0.5, 1.0, 1.5)[h] for i in range(LAYERS) for h in range(KV_HEADS)}

    ways = {
        "DynamicCache": lambda: DynamicCache(config=config),
        "StaticCache": None,
        "keep 1": compressed(keep_ratio=1.0),
        "keep 0.5": compressed(keep_ratio=0.5),
        "keep 0.1": compressed(keep_ratio=0.1),
        "keep 0.5 by head": compressed(head_ratios=head_plan(0.5)),
        "keep 0.1 by head": compressed(head_ratios=head_plan(0.1)),
    }
    token = torch.tensor([[5]])
    print(f"Decoding ({NEW_TOKENS} tokens, {torch.get_num_threads()} threads): tokens/s, MiB of the cache")
    with torch.inference_mode():
        for n in LENGTHS:
            times: dict[str, list[float]] = {way: [] for way in ways}
            static = lambda: StaticCache(config=config, max_cache_len=n + NEW_TOKENS + 8)  # noqa: B023, E731
            caches = {way: filled(make or static, n) for way, make in ways.items()}
            with compressible(model):
                for turn in range(-3, NEW_TOKENS):  # token by token, by turns; the first ones warm up
                    for way, cache in caches.items():
                        taken = seconds(lambda: model(token, past_key_values=cache))  # noqa: B023
                        if turn >= 0:
                            times[way].append(taken)
            sizes = {way: cache_nbytes(cache) / 2**20 for way, cache in caches.items()}
            rate = {way: 1 / statistics.median(column) for way, column in times.items()}
            print(f"  {n} tokens: " + ", ".join(f"{way} {rate[way]:.1f} ({sizes[way]:.0f})" for way in ways))
            print(
                f"    keep 1 against DynamicCache {rate['keep 1'] / rate['DynamicCache']:.2f}, "
                f"StaticCache {rate['keep 1'] / rate['StaticCache']:.2f}; "
                f"keep 0.5 and 0.1 against keep 1 {rate['keep 0.5'] / rate['keep 1']:.2f}, "
                f"{rate['keep 0.1'] / rate['keep 1']:.2f}; a plan by head takes "
                f"{rate['keep 0.5'] / rate['keep 0.5 by head']:.2f}, {rate['keep 0.1'] / rate['keep 0.1 by head']:.2f} "
                "of uniform's time"
            )


PREFILLS = {"DynamicCache, one pass": (None, None), "keep 0.1, one pass": (0.1, None), "keep 0.1, chunks": (0.1, 1024)}


def prefill_peak(way: str, n: int = 16384) -> dict[str, float]:
    """Bytes beyond the model, at most, of a prefill and one token."""
    import torch
    from transformers import DynamicCache, LlamaForCausalLM

    from l2kv import CompressedCache, CompressionSpec, compressible

    ratio, chunk = PREFILLS[way]
    torch.manual_seed(0)
    config = shape(n + 16)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(0, VOCABULARY, (1, n))
    with torch.inference_mode():
        model(ids[:, :64])  # warm up kernels, not the allocator
    cache = DynamicCache(config=config) if ratio is None else CompressedCache(config, CompressionSpec(keep_ratio=ratio))
    options = {"prefill_chunk_size": chunk} if chunk else {}
    with compressible(model):
        peak = peak_bytes(
            lambda: model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, **options)
        )
    return {"bytes": peak}


def prefill() -> None:
    print("A prompt of 16384 tokens through generate(): peak beyond the model")
    results = {}
    for way in PREFILLS:
        out = subprocess.run([sys.executable, "-m", __spec__.name, way], capture_output=True, text=True, check=True)
        results[way] = json.loads(out.stdout.splitlines()[-1])
        print(f"  {way:24} {results[way]['bytes'] / 2**20:6.0f} MiB")
    whole = results["DynamicCache, one pass"]["bytes"]
    print(f"  chunks with eviction between them take 1/{whole / results['keep 0.1, chunks']['bytes']:.1f} of one pass")


def main() -> None:
    compression()
    decoding()
    prefill()


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1] in PREFILLS:
        print(json.dumps(prefill_peak(sys.argv[1])))
    else:
        steps = {"compression": compression, "decoding": decoding, "prefill": prefill}
        for step in sys.argv[1:] or steps:
            steps[step]()
