"""`make bench`: what a capture costs compared with plain passes, each in a process of its own so that peaks do not mix.

Shape: 30 layers, 9 query and 3 kv heads, 576 wide, 2048 tokens, float32, random weights (right for time and memory).
Memory is the peak resident set beyond the loaded model; time is the best of three runs after a warm-up.
"""

from __future__ import annotations

import json
import subprocess
import sys

from tests.support.measuring import peak_bytes, seconds

LAYERS, WIDTH, TOKENS = 30, 576, 2048
WAYS = {
    "sdpa": "the plain forward pass",
    "eager": "output_attentions=True",
    "capture": "analysis.capture",
}


def measure(way: str, repeats: int = 3) -> dict[str, float]:
    """Seconds and bytes of one way, in this process."""
    import torch
    from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

    from analysis.models.load import BUNDLED, LoadedModel
    from analysis.recorder import capture

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "books-5m")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=WIDTH,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        attn_implementation="eager" if way == "eager" else "sdpa",
    )
    loaded = LoadedModel(LlamaForCausalLM(config).eval(), tokenizer, way)
    text = "a" + " a" * (TOKENS - 3)  # with <s>, about TOKENS tokens
    ids = torch.tensor([tokenizer(text).input_ids])

    def run():
        if way == "capture":
            return capture(loaded, text)
        with torch.inference_mode():
            return loaded.model(
                ids,
                past_key_values=DynamicCache(config=config),
                use_cache=True,
                logits_to_keep=1,
                output_attentions=way == "eager",
            )

    with torch.inference_mode():
        loaded.model(ids[:, :64])  # warm up kernels, not the allocator
    peak = peak_bytes(run)
    return {"seconds": min(seconds(run) for _ in range(repeats)), "bytes": peak, "tokens": ids.shape[1]}


def main() -> None:
    results = {}
    for way in WAYS:
        out = subprocess.run([sys.executable, "-m", __spec__.name, way], capture_output=True, text=True, check=True)
        results[way] = json.loads(out.stdout.splitlines()[-1])
    eager, plain = results["eager"], results["sdpa"]
    print(f"{LAYERS} layers, 9 query and 3 kv heads, {WIDTH} wide, {eager['tokens']} tokens, float32 on this machine")
    for way, label in WAYS.items():
        r = results[way]
        print(f"{label:24} {r['seconds']:6.2f} s  {r['bytes'] / 2**20:5.0f} MiB beyond the model")
    ours = results["capture"]
    extra, eager_extra = (way["bytes"] - plain["bytes"] for way in (ours, eager))
    print(f"time of a capture: {ours['seconds'] / eager['seconds']:.2f} of output_attentions=True's, ", end="")
    print(f"{ours['seconds'] / plain['seconds']:.2f} times the plain pass's")
    print(f"its memory: 1/{eager['bytes'] / ours['bytes']:.0f} beyond the model, ", end="")
    print(f"1/{eager_extra / max(extra, 1):.0f} beyond the plain pass")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
