"""Savings of a compression, by arithmetic, and its export as code: for this library, for `generate`, for kvpress."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from importlib.util import decode_source
from pathlib import Path
from typing import Any

from analysis.errors import SettingsError
from analysis.models.gguf import is_gguf
from analysis.models.load import NAMED_MODELS
from analysis.models.packaged import PACKAGED
from analysis.plans.curves import BY_NORM
from analysis.words import counted
from l2kv.config import CacheShape
from l2kv.policies import OF_FILE, POLICIES
from l2kv.policy_files import policy_source
from l2kv.spec import CompressionSpec, Target

_LINE = 100  # characters of a prompt on a line of a script
LENGTHS = (4096, 32_768, 131_072)  # tokens, that savings are told at


@dataclass(frozen=True, slots=True)
class Saving:
    """Savings of a spec at one length for a batch of sequences, by arithmetic."""

    n_tokens: int
    full_bytes: int  # bytes of the batch's full caches
    kept_bytes: int
    full_fits: int | None  # sequences of this length that fit the GPU beside the weights; None: any number
    kept_fits: int | None
    full_seconds: float  # a step of a dense model takes at least this: all weights, and caches, are read once
    kept_seconds: float


def savings(
    shape: CacheShape,
    spec: CompressionSpec,
    *,
    weights_bytes: int,
    gpu_bytes: int,
    bandwidth: float,
    lengths: Sequence[int] = LENGTHS,
    batch: int = 1,
) -> tuple[Saving, ...]:
    """Compute, at each length, bytes, sequences that fit, and the time of a decoding step by memory bandwidth.

    Activations, the allocator's waste, layers with a sliding window (the same in both) and the cost of choosing what to
    evict are not counted. The time is that of a dense model: a mixture of experts reads but some of its
    weights for a token, so its step may take less.

    Args:
        bandwidth: bytes per second of the GPU's memory.
        lengths: tokens seen by each sequence.
        batch: number of sequences decoded at once.

    Raises:
        SettingsError: a number is not positive, or infinite, or no layer keeps every token.
    """
    if not shape.layers:
        raise SettingsError(
            "there is nothing to save: each layer has a sliding window, so its cache is bounded already"
        )
    for name, value in (("gpu_bytes", gpu_bytes), ("bandwidth", bandwidth), ("batch", batch)):
        if not 0 < value < math.inf:
            raise SettingsError(f"{name} must be positive and finite, got {value!r}")
    if weights_bytes < 0 or any(n < 1 for n in lengths):
        raise SettingsError(f"weights_bytes and lengths must be positive, got {weights_bytes!r} and {tuple(lengths)!r}")
    room = max(gpu_bytes - weights_bytes, 0)
    rows = []
    for n in lengths:
        full, kept = shape.nbytes(n), shape.nbytes(n, spec)
        full_fits, kept_fits = (room // size if size else None for size in (full, kept))
        full_seconds, kept_seconds = ((weights_bytes + batch * size) / bandwidth for size in (full, kept))
        rows.append(Saving(n, batch * full, batch * kept, full_fits, kept_fits, full_seconds, kept_seconds))
    return tuple(rows)


_CHOSEN = ("keep_ratio", "policy", "skip_layers", "protect_last", "prune_after")  # written down even as by default


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy generation that a script does again, as `analysis.preview.stream` did it."""

    prompt: str
    chat: bool
    new_tokens: int
    dtype: str


def library_code(spec: CompressionSpec, ref: str, again: Generation | None = None, *, told: Iterable[str] = ()) -> str:
    """Write a Python script that generates with a spec, where this library is installed.

    Args:
        ref: the model: a name that `load_model` knows, a GGUF file, a folder or a hub id.
        again: what to generate; by default an example, through the chat template where the model has one.
        told: lines to begin with, as comments: how the compression was judged (`Decision.told`).
    """
    lines = "".join(textwrap.fill(line, 118, initial_indent="# ", subsequent_indent="#   ") + "\n" for line in told)
    by_ids = POLICIES[spec.policy].needs_token_ids
    names = f"CompressedCache, CompressionSpec, compressible{', load_policy' if OF_FILE.fullmatch(spec.policy) else ''}"
    names += ", special_ids" if by_ids else ""
    if ref in NAMED_MODELS or is_gguf(Path(ref)):
        imports = f"from analysis import load_model\nfrom l2kv import {names}\n"
        load = f"loaded = load_model({_quoted(ref)})\nmodel, tokenizer = loaded.model, loaded.tokenizer\n"
    else:
        imports = f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\nfrom l2kv import {names}\n"
        dtype = again.dtype if again else "auto"
        load = (
            f'model = AutoModelForCausalLM.from_pretrained({_quoted(ref)}, dtype="{dtype}")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({_quoted(ref)})\n"
        )
    arguments = "".join(f"    {argument},\n" for argument in _arguments(spec))
    if again:
        imports = f"import torch\n{imports}from l2kv.decoding import prefill\n"
    return f"""{lines}# Needs l2kv, which is not on the package index: run it in the environment of `make app` (.venv in
# this project's folder), or pip install that folder.
{imports}
{load}
spec = CompressionSpec(
{arguments})

{_inputs_code(again)}
with compressible(model){", torch.no_grad()" if again else ""}:
    cache = CompressedCache(model.config, spec{", special_ids=special_ids(tokenizer)" if by_ids else ""})
{_PREFILL if again else ""}\
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens={again.new_tokens if again else 48}, \
do_sample=False)
print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
{"" if again else _HELD}"""


_HELD = """\
print("tokens held, by layer:", *cache.held, "of", output.shape[1] - 1)
"""
_EXAMPLE = """\
filler = "The grass is green. The sky is blue. The sun is yellow. Here we go. " * 20
prompt = f"{filler}The pass key is 71432. Remember it. {filler}What is the pass key?"
"""
_PREFILL = """\
    # Compressed before its last token is read: even the first new token comes from what is kept.
    prefill(model, inputs.input_ids[:, :-1], cache)
"""
_TEMPLATED = """\
messages = [{"role": "user", "content": prompt}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
"""


def _inputs_code(again: Generation | None) -> str:
    """Write how a prompt becomes tokens."""
    if again is None:
        prompt = _EXAMPLE
        templated = "if tokenizer.chat_template:\n" + textwrap.indent(_TEMPLATED, "    ")
        special = ", add_special_tokens=not tokenizer.chat_template"
    else:
        prompt = f"prompt = {_wrapped(again.prompt)}\n"
        templated, special = (_TEMPLATED, ", add_special_tokens=False") if again.chat else ("", "")
    return f'''\
{prompt}{templated}inputs = tokenizer(prompt, return_tensors="pt"{special}).to(model.device)'''


def _wrapped(text: str) -> str:
    """Write a text as a literal of Python, of several lines if it is long."""
    lines = [text[i : i + _LINE] for i in range(0, len(text), _LINE)]
    # JSON would write an emoji as two characters.
    return repr(text) if len(lines) < 2 else "(\n" + "".join(f"    {line!r}\n" for line in lines) + ")"


def generate_code(spec: CompressionSpec, special_ids: Iterable[int] | None = None) -> str:
    """Write `custom_generate/generate.py`, by which transformers' own `generate` uses a compressed cache.

    A policy of a file is imported from a copy of it beside the code.

    Args:
        special_ids: as for `CompressedCache`.

    Raises:
        SpecError: the policy is of a file that is not loaded.
    """
    imports, policy = "from l2kv import CompressedCache, CompressionSpec, compressible", ""
    if OF_FILE.fullmatch(spec.policy):
        module, function, _ = policy_source(spec.policy)
        imports = f"from inspect import getfile\n\n{imports}, load_policy\n\nfrom .{module} import {function}"
        policy = f'load_policy(f"{{getfile({function})}}:{function}")'  # transformers copies files that are imported
    known, ids = "", ""
    if special_ids is not None:
        listed = textwrap.fill(", ".join(map(str, special_ids)), 116, initial_indent="    ", subsequent_indent="    ")
        known, ids = f"SPECIAL_IDS = (\n{listed},\n)\n", ", special_ids=SPECIAL_IDS"
    arguments = "".join(f"    {argument},\n" for argument in _arguments(spec, policy))
    return f'''\
"""Generation over a compressed key/value cache. transformers runs it where a user tells it to trust this folder's code.

Needs the package l2kv. All arguments of `generate` are as usual; a `past_key_values` of one's own is used as it is.
"""

{imports}

SPEC = CompressionSpec(
{arguments})
{known}

def generate(*args, model, past_key_values=None, **kwargs):
    """Generate as transformers does; the cache holds what SPEC says."""
    if past_key_values is None:
        past_key_values = CompressedCache(model.config, SPEC{ids})
    with compressible(model):
        return type(model).generate(model, *args, past_key_values=past_key_values, **kwargs)
'''


def press_code(policy: str) -> str:
    """Write a policy of a file as a press of NVIDIA's kvpress: the file, and a `ScorerPress` after it.

    kvpress compresses the prompt once, rounds the pairs that are kept down, and protects none.

    Raises:
        SpecError: the policy is of no file, or of one that is not loaded.
    """
    module, function, source = policy_source(policy)
    name = "".join(word.capitalize() for word in f"{module}_{function}".split("_"))
    return f'''{decode_source(source).rstrip()}


# The policy {policy}, for NVIDIA's kvpress: pip install kvpress
import torch  # noqa: E402
from kvpress import ScorerPress  # noqa: E402


class {name}Press(ScorerPress):
    """Press that keeps the pairs of highest `{function}`; takes the share to remove, as compression_ratio."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        """Scores [B, kv heads, T] of the pairs of a prompt."""
        positions = torch.arange(keys.shape[2], device=keys.device).expand(keys.shape[:3])
        return {function}(keys, values, positions).float().expand(keys.shape[:3])
'''


def _arguments(spec: CompressionSpec, policy: str = "") -> list[str]:
    """Arguments of a spec, one to a line: those that a user chooses, and others that are not the default.

    Args:
        policy: expression for the policy; by default its name, or that of a file in the folder where the code runs.
    """
    if not policy:
        of_file = OF_FILE.fullmatch(spec.policy)
        policy = f"load_policy({_quoted(of_file[1])})" if of_file else _quoted(spec.policy)
    chosen = [
        field.name
        for field in fields(spec)
        if (value := getattr(spec, field.name)) is not None and (field.name in _CHOSEN or value != field.default)
    ]
    return [f"{name}={policy if name == 'policy' else _written(name, getattr(spec, name))}" for name in chosen]


def _written(name: str, value: Any) -> str:
    if name in ("layer_ratios", "head_ratios"):
        return repr(dict(value))
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    return json.dumps(text)  # double quotes; and what JSON writes of a text Python reads as the same


def kvpress_code(spec: CompressionSpec, shape: CacheShape, ref: str, *, n_layers: int | None = None) -> str:
    """Write the nearest Python for NVIDIA's kvpress: the same share of pairs in each layer, by key norm.

    Comments in it say what of the spec kvpress's presses cannot express.

    Args:
        ref: the model, as in `library_code`.
        n_layers: number of the model's layers, if layers with a sliding window come after those of the shape.

    Raises:
        SettingsError: the policy does not go by key norm, or the shape has no layer that can be compressed.
    """
    if spec.policy not in BY_NORM:
        raise SettingsError(f"kvpress_code is for key norms ({', '.join(BY_NORM)}), got {spec.policy!r}")
    if not shape.layers:
        raise SettingsError("no layer of this model can be compressed")
    lost = ["0.0"] * (n_layers or max(shape.layers) + 1)
    for layer in shape.layers:
        lost[layer] = _lost([spec.target_of(layer, head) for head in range(shape.n_kv_heads)])
    uniform = len({lost[layer] for layer in shape.layers}) == 1
    if uniform:
        imports, press = "KnormPress", f"KnormPress(compression_ratio={lost[shape.layers[0]]})"
        load = 'device_map="auto")'
    else:
        imports = "KnormPress, PerLayerCompressionPress"
        press = f"PerLayerCompressionPress(KnormPress(), [{', '.join(lost)}])"
        load = 'device_map="auto", model_kwargs={"attn_implementation": "flash_attention_2"})'
    notes = [note for note, holds in _kvpress_cannot(spec) if holds]
    if not uniform:
        notes.insert(0, "Layers of different lengths: PerLayerCompressionPress works with flash attention, on a GPU.")
    return (
        "# pip install kvpress\n"
        + "".join(f"# {note}\n" for note in ["The nearest in kvpress; it rounds pairs down, l2kv up.", *notes])
        + f"from kvpress import {imports}\nfrom transformers import pipeline\n\n"
        + ("n_tokens = 4096  # of your context\n" * any("n_tokens" in each for each in lost))
        + f"press = {press}\n"
        + f'pipe = pipeline("kv-press-text-generation", model={_quoted(_files_of(ref))}, {load}\n'
        + 'context = "The old man looked at the sea. He saw a sail."\nquestion = "What did the old man see?"\n'
        + 'print(pipe(context, question=question, press=press)["answer"])\n'
    )


def _files_of(ref: str) -> str:
    """Reference by which other programs load a model."""
    if packaged := PACKAGED.get(ref):
        return packaged.original
    return f"analysis/bundled/{ref}" if ref in NAMED_MODELS else ref


def _lost(targets: Sequence[Target]) -> str:
    """The share of its pairs that a layer of these kv heads loses, as an expression."""
    ratio = sum(target.ratio for target in targets if target.budget is None) / len(targets)
    tokens = sum(target.budget or 0 for target in targets) / len(targets)
    if tokens:
        return f"max(0.0, {1 - ratio:.4g} - {tokens:g} / n_tokens)"
    return f"{min(1 - ratio, 0.9999):.4g}"  # kvpress refuses 1


def _kvpress_cannot(spec: CompressionSpec) -> list[tuple[str, bool]]:
    """Features that kvpress lacks, and whether the spec uses each."""
    return [
        ("It compresses once, after the prompt: what is generated is kept. l2kv evicts as tokens come.", True),
        (f"KnormPress keeps low norms everywhere; the spec's {spec.policy} keeps others.", spec.policy != "low_norm"),
        ("Ratios per kv head become one for each layer, of the same total.", spec.head_ratios is not None),
        (f"The first {counted(spec.protect_first, 'token')} can be evicted.", spec.protect_first > 0),
        (f"The last {counted(spec.protect_last, 'token')} can be evicted.", spec.protect_last > 0),
        (f"Caches under {counted(spec.prune_after, 'token')} are not left alone.", spec.prune_after > 0),
        ("Keys and values are stored in full, not in fewer bits or channels.", spec.codes),
        ("A ratio of the pairs held, anew each time, is not known.", spec.schedule == "reference"),
        ("Pinned tokens may be evicted.", bool(spec.pinned)),
    ]
