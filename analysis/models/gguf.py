"""Reader of a GGUF file's header, which is untrusted. Needs no torch, numpy or transformers.

A GGUF file is a header (metadata, then a table of tensors) and the tensors' bytes. Whoever opens one with a library
trusts its counts, lengths and offsets; `read_gguf` reads the header first and refuses what does not add up. It
touches no weights. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3).
"""

from __future__ import annotations

import math
import stat
import struct
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from analysis.errors import ModelError
from analysis.models.vet import BOUNDS, one_line

MAGIC = b"GGUF"
ARCHITECTURES = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen2moe", "qwen3", "qwen3moe", "starcoder2")
"""As llama.cpp names them (a Mistral is a `llama`): each is compared with its original in the tests."""

# At most, so that no file takes long or much to refuse. The largest of real ones: 262,144 tokens with 514,906 merges.
_KEYS, _TENSORS, _STRINGS = 1024, 16_384, 2_000_000  # strings: in arrays, where they are counted and not kept
_STRING = 2**20  # bytes of one
_SKIPPED = 64 * 2**20  # bytes of all strings in arrays; those of real ones are 10 MiB
_NUMBERS = 4096  # in an array that is kept; longer ones are counted
_KEPT = 4 * 2**20  # bytes of text, and 32 for a number in an array
_AGAIN = "The file is damaged or incomplete: fetch or convert it again"
_CONVERT = "Convert the model with a current llama.cpp, or give it in safetensors"

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_BOOL, _STR, _ARRAY = 7, 8, 9
_KINDS = {7: "bool", 8: "string", 9: "array"} | {n: "number" for n in _SCALARS if n != _BOOL}

# Of each tensor type that can be dequantised, by its number in the file: its name, and of how many weights and bytes
# a block is. Not among them: integers, and the types that are for activations only (Q8_1, Q8_K).
_TYPES = {
    0: ("float32", 1, 4), 1: ("float16", 1, 2), 30: ("bfloat16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36),
}  # fmt: skip

# What sizes a model has by GGUF's names, and by the names under which configs.py bounds them.
_REQUIRED = {
    "context_length": "positions",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_SIZES = _REQUIRED | {
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "rope.dimension_count": "head_dim",
    "expert_feed_forward_length": "intermediate_size",
    "expert_shared_feed_forward_length": "intermediate_size",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts",
    "vocab_size": "vocab_size",
}

_SIZE_BOUNDS = BOUNDS | {"positions": 2**31}

# Keys under the architecture's name that change what a model computes, in ways that are not reproduced here: these
# files would load without a word, and be another model. Value: what the key may be without changing anything.
_NEUTRAL = {
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.causal": (True,),
    "expert_count": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "attention.sliding_window": (0,),
}
_UNDERSTOOD = {  # and where some of them are reproduced
    "gemma2": {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"},
    "gemma3": {"attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window"},
    "phi3": {"attention.sliding_window"},
    "qwen2moe": {"expert_count"},
    "qwen3moe": {"expert_count"},
}


@dataclass(frozen=True, slots=True)
class GgufArray:
    """An array in the metadata. `items` holds a short array of numbers; strings are only counted."""

    kind: str  # "number", "bool" or "string"
    count: int
    items: tuple[int | float, ...] | None = None


Value = int | float | bool | str | GgufArray


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Place and storage type of a tensor in the file."""

    name: str
    shape: tuple[int, ...]  # in torch's order, the fastest index last
    type: str  # such as "Q4_1" or "float16"
    type_id: int  # the type by its number
    start: int  # byte in the file
    nbytes: int

    @property
    def n_weights(self) -> int:
        """Number of weights in the tensor."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A vetted GGUF file: every tensor lies within it, and its sizes are within bounds."""

    path: Path
    name: str
    metadata: dict[str, Value]
    tensors: tuple[GgufTensor, ...]

    @property
    def architecture(self) -> str:
        """Name of the model's architecture, such as "llama"."""
        return str(self.metadata["general.architecture"])

    def of_architecture(self, key: str) -> Any:
        """Look up a value such as "block_count" under the architecture's name; None if missing. Sizes are vetted."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def tensor_names(self) -> frozenset[str]:
        """Names of all tensors, by llama.cpp's convention."""
        return frozenset(tensor.name for tensor in self.tensors)

    @property
    def vocab_size(self) -> int:
        """Number of rows in the token embedding: the file may have fewer tokens."""
        return next(tensor.shape[0] for tensor in self.tensors if tensor.name == "token_embd.weight")

    @property
    def stored(self) -> str:
        """Storage type of most of the matrices' bytes, such as "Q4_1" or "float16"."""
        nbytes = Counter[str]()
        for tensor in self.tensors:
            nbytes[tensor.type] += tensor.nbytes * (len(tensor.shape) > 1)
        return nbytes.most_common(1)[0][0]

    @property
    def n_weights(self) -> int:
        """Number of weights in all tensors."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(tensor.nbytes for tensor in self.tensors)


def is_gguf(path: Path) -> bool:
    """Tell whether a file is GGUF by its name or its first bytes (Ollama's blobs have no extension)."""
    try:
        if not path.is_file():
            return False
        if path.suffix.lower() == ".gguf":
            return True
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except (OSError, ValueError):
        return False


def gguf_name(path: Path) -> str:
    """Name of the model in a file: the file's name, or the beginning of a blob's hash."""
    return path.stem if path.suffix.lower() == ".gguf" else path.name[:19]


def read_gguf(path: Path) -> GgufFile:
    """Read and vet the header of a GGUF file.

    Raises:
        ModelError: the file is damaged or hostile, has an unsupported architecture or tensor type, or is no model; the
            message says which, where, and what to do.
    """
    name = gguf_name(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait
            raise ModelError(f"{name} is no regular file. Give the GGUF file itself.")
        with path.open("rb") as file:
            reader = _Reader(file, status.st_size, name)
            metadata, n_tensors = _read_metadata(reader)
            tensors = _read_tensors(reader, n_tensors, _alignment(reader, metadata))
    except OSError as error:
        raise ModelError(f"{name} cannot be read ({one_line(error)}). Check the path and its permissions.") from error
    except struct.error as error:
        raise ModelError(f"{name} became shorter while it was read. {_AGAIN}.") from error
    gguf = GgufFile(path, name, metadata, tensors)
    _check_model(gguf)
    _check_tokenizer(gguf)
    return gguf


class _Reader:
    """Reads a file's header in order, and never beyond what is there."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name
        self.at = self.kept = self.strings = 0
        self.left = _SKIPPED

    def error(self, wrong: str, todo: str = _AGAIN) -> ModelError:
        return ModelError(f"{self.name}: {wrong}. {todo}.")

    def room(self, n: int, what: str) -> None:
        """Raise unless `n` bytes are left."""
        if n > self.size - self.at:
            left = self.size - self.at
            raise self.error(f"it is cut off in {what}: {n:,} bytes are needed at byte {self.at:,}, {left:,} are left")

    def take(self, n: int, what: str) -> bytes:
        self.room(n, what)
        self.at += n
        return self.file.read(n)

    def number(self, form: str, what: str) -> int | float:
        number: int | float = struct.unpack(form, self.take(struct.calcsize(form), what))[0]
        return number

    def whole(self, form: str, what: str) -> int:
        return int(self.number(form, what))

    def keep(self, n: int, what: str) -> None:
        """Raise if with `n` bytes more too much would be kept."""
        self.kept += n
        if self.kept > _KEPT:
            raise self.error(f"its metadata up to {what} takes more than {_KEPT:,} bytes")

    def string(self, what: str) -> str:
        if (n := self.whole("<Q", f"the length of {what}")) > _STRING:
            raise self.error(f"{what} is a string of {n:,} bytes at byte {self.at:,}, and at most {_STRING:,} are read")
        self.keep(n, what)
        try:
            return self.take(n, what).decode()
        except UnicodeDecodeError:
            raise self.error(f"{what} is not text in UTF-8, at byte {self.at - n:,}") from None

    def value(self, what: str) -> Value:
        kind = self.whole("<I", f"the type of {what}")
        if kind == _STR:
            return self.string(what)
        if kind == _ARRAY:
            return self.array(what)
        if kind not in _SCALARS:
            raise self.error(f"{what} has type {kind}, which GGUF does not have")
        number = self.number(_SCALARS[kind], what)
        if kind == _BOOL and number > 1:
            raise self.error(f"{what} is {number}, which is neither true nor false")
        return bool(number) if kind == _BOOL else number

    def array(self, what: str) -> GgufArray:
        kind, count = self.whole("<I", f"the type of {what}"), self.whole("<Q", f"the length of {what}")
        if kind == _ARRAY:
            raise self.error(f"{what} is an array of arrays, which is not supported", _CONVERT)
        if kind not in _KINDS:
            raise self.error(f"{what} is an array of type {kind}, which GGUF does not have")
        if kind == _STR:
            self.strings += count
            if self.strings > _STRINGS:
                raise self.error(f"{what} is an array of {count:,} strings, and at most {_STRINGS:,} are read in all")
            self.room(8 * count, what)
            self.skip_strings(count, what)
            return GgufArray("string", count)
        form = _SCALARS[kind]
        width = struct.calcsize(form)
        self.room(width * count, what)
        if count > _NUMBERS:
            self.at += width * count
            self.file.seek(self.at)
            return GgufArray(_KINDS[kind], count)
        self.keep(32 * count, what)
        items = struct.unpack(f"<{count}{form[1]}", self.take(width * count, what))
        return GgufArray(_KINDS[kind], count, items)

    def skip_strings(self, count: int, what: str) -> None:
        """Go past `count` strings. A vocabulary has hundreds of thousands: nothing is kept, nothing called twice."""
        read, unpack, at, begin = self.file.read, struct.Struct("<Q").unpack, self.at, self.at
        end = min(self.size, begin + self.left)
        for i in range(count):
            at += 8
            if at > end:
                break
            (n,) = unpack(read(8))
            if n > _STRING:
                raise self.error(f"item {i} of {what} is a string of {n:,} bytes, and at most {_STRING:,} are read")
            at += n
            if at > end:
                break
            read(n)
        if at > end:
            if end < self.size:
                raise self.error(f"its lists of strings up to item {i} of {what} take more than {_SKIPPED:,} bytes")
            raise self.error(f"item {i} of {what} ends beyond the {self.size:,} bytes of the file")
        self.left -= at - begin
        self.at = at


def _read_metadata(reader: _Reader) -> tuple[dict[str, Value], int]:
    """All keys and values, and the number of tensors."""
    if reader.take(4, "the magic") != MAGIC:
        raise reader.error(f"it is not a GGUF file: it does not begin with {MAGIC.decode()}", "Give a GGUF file")
    version = reader.whole("<I", "the version")
    if version in (0x02000000, 0x03000000):
        raise reader.error("it is big-endian, which is not supported", _CONVERT)
    if version not in (2, 3):
        raise reader.error(f"it is GGUF version {version}; versions 2 and 3 are supported", _CONVERT)
    n_tensors, n_keys = reader.whole("<Q", "the number of tensors"), reader.whole("<Q", "the number of keys")
    for what, n, bound in (("tensors", n_tensors, _TENSORS), ("keys", n_keys, _KEYS)):
        if n > bound:
            raise reader.error(f"it announces {n:,} {what}, which is out of range (at most {bound:,})")
    metadata: dict[str, Value] = {}
    for i in range(n_keys):
        key = reader.string(f"the name of key {i}")
        if key in metadata:
            raise reader.error(f"the key {key!r:.80} appears twice")
        metadata[key] = reader.value(f"{key!r:.80}")
    return metadata, n_tensors


def _alignment(reader: _Reader, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise reader.error(f"general.alignment is {_shown(alignment)}, and must be a power of two from 8 to 1048576")
    return alignment


def _read_tensors(reader: _Reader, n_tensors: int, alignment: int) -> tuple[GgufTensor, ...]:
    """The table of tensors: each within the file, none over another."""
    if not n_tensors:
        raise reader.error("it has no tensors: it is a vocabulary or metadata only", "Give the file with the weights")
    table = []
    for i in range(n_tensors):
        name = reader.string(f"the name of tensor {i}")
        what = f"the tensor {name!r:.80}"
        if not 1 <= (n_dims := reader.whole("<I", what)) <= 4:
            raise reader.error(f"{what} has {n_dims} dimensions, which is out of range (1 to 4)")
        dims = struct.unpack(f"<{n_dims}Q", reader.take(8 * n_dims, what))
        type_id, offset = reader.whole("<I", what), reader.whole("<Q", what)
        if type_id not in _TYPES:
            raise reader.error(f"{what} has type {type_id}, which cannot be dequantised", _CONVERT)
        type_name, block, block_bytes = _TYPES[type_id]
        if not all(dims) or dims[0] % block:
            raise reader.error(f"{what} has dimensions {list(dims)}, but {type_name} stores rows in blocks of {block}")
        if offset % alignment:
            raise reader.error(f"{what} begins at {offset:,}, which is not a multiple of the alignment, {alignment}")
        table.append(GgufTensor(name, dims[::-1], type_name, type_id, offset, math.prod(dims) // block * block_bytes))
    begin = -(-reader.at // alignment) * alignment
    tensors = tuple(replace(tensor, start=begin + tensor.start) for tensor in table)
    by_place = sorted(tensors, key=lambda tensor: tensor.start)
    for tensor, after in zip(by_place, [*by_place[1:], None], strict=True):
        if (end := tensor.start + tensor.nbytes) > reader.size:
            raise reader.error(
                f"the tensor {tensor.name!r:.80} ends at byte {end:,}, and the file has {reader.size:,} bytes"
            )
        if after is not None and end > after.start:
            raise reader.error(f"the tensors {tensor.name!r:.80} and {after.name!r:.80} overlap")
    name, times = Counter(tensor.name for tensor in tensors).most_common(1)[0]
    if times > 1:
        raise reader.error(f"the tensor {name!r:.80} appears {times} times")
    return tensors


def _check_model(gguf: GgufFile) -> None:
    """Refuse what is no whole decoder-only model of a known architecture, or out of bounds."""
    architecture, metadata = gguf.metadata.get("general.architecture"), gguf.metadata
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{gguf.name}: its architecture is {_shown(architecture)}; from GGUF files, these can be loaded: "
            f"{', '.join(ARCHITECTURES)}. Give the model in safetensors."
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ModelError(f"{gguf.name}: its type is {_shown(kind)}, not 'model'. Give the file of the model itself.")
    if (parts := metadata.get("split.count", 0)) not in (0, 1):
        raise ModelError(
            f"{gguf.name}: it is one of {_shown(parts)} parts of a model. Join them with `llama-gguf-split --merge`, "
            "and give that file."
        )
    for key, as_config in _SIZES.items():
        value = gguf.of_architecture(key)
        if key not in _REQUIRED and (value is None or (value == 0 and key.startswith("expert_"))):
            continue
        if isinstance(value, GgufArray):
            raise ModelError(
                f"{gguf.name}: {architecture}.{key} is a list of {value.count:,}; layers that differ in it are not "
                "supported. Give the model in safetensors."
            )
        if type(value) is not int or not 0 < value <= _SIZE_BOUNDS[as_config]:
            raise ModelError(
                f"{gguf.name}: {architecture}.{key} is {_shown(value)}, and must be a whole number from 1 to "
                f"{_SIZE_BOUNDS[as_config]}. {_AGAIN}."
            )
    heads = gguf.of_architecture("attention.head_count")
    if heads % (kv_heads := gguf.of_architecture("attention.head_count_kv") or heads):
        raise ModelError(
            f"{gguf.name}: its {heads} query heads are not a multiple of its {kv_heads} kv heads. {_AGAIN}."
        )
    epsilons = [gguf.of_architecture(f"attention.layer_norm_{kind}epsilon") for kind in ("rms_", "")]
    if not any(isinstance(epsilon, float) and 0 < epsilon < 1 for epsilon in epsilons):
        raise ModelError(f"{gguf.name}: the epsilon of its norms is {_shown(epsilons[0])}. {_AGAIN}.")
    for key, neutral in _NEUTRAL.items():
        value = gguf.of_architecture(key)
        if key not in _UNDERSTOOD.get(architecture, ()) and value is not None and value not in neutral:
            raise ModelError(
                f"{gguf.name}: {architecture}.{key} is {_shown(value)}, which is not reproduced from GGUF. Give the "
                "model in safetensors."
            )
    for key, value in metadata.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ModelError(f"{gguf.name}: {key!r:.80} is {value}, not a finite number. {_AGAIN}.")
    embedding = next((tensor for tensor in gguf.tensors if tensor.name == "token_embd.weight"), None)
    if embedding is None or len(embedding.shape) != 2:
        got = "missing" if embedding is None else f"of shape {list(embedding.shape)}"
        raise ModelError(f"{gguf.name}: its token embedding (token_embd.weight) is {got}. {_AGAIN}.")
    if gguf.vocab_size > BOUNDS["vocab_size"]:
        raise ModelError(
            f"{gguf.name}: its vocabulary is of {gguf.vocab_size:,} tokens, which is out of range (at most "
            f"{BOUNDS['vocab_size']:,}). {_AGAIN}."
        )


def _check_tokenizer(gguf: GgufFile) -> None:
    """Refuse a file without a whole tokenizer that can be rebuilt."""
    start = "tokenizer.ggml."
    told: dict[str, Any] = {
        key.removeprefix(start): value for key, value in gguf.metadata.items() if key.startswith(start)
    }
    kind = told.get("model")

    def refuse(wrong: str) -> ModelError:
        return ModelError(f"{gguf.name}: {wrong}. {_CONVERT}.")

    def counted(key: str, kind: str) -> bool:
        if key not in told:
            return False
        value = told[key]
        if not isinstance(value, GgufArray) or value.kind != kind:
            raise refuse(f"tokenizer.ggml.{key} is {_shown(value)}, not an array of {kind}s")
        return True

    if "tokens" not in told:
        raise refuse("it has no tokenizer (tokenizer.ggml.tokens)")
    if kind not in ("gpt2", "llama"):
        raise refuse(f"its tokenizer is {_shown(kind)} (tokenizer.ggml.model); gpt2 and llama are supported")
    counted("tokens", "string")
    tokens = told["tokens"]
    if not 0 < tokens.count <= gguf.vocab_size:
        raise refuse(f"its tokenizer has {tokens.count:,} tokens, but its embedding has {gguf.vocab_size:,} rows")
    if not counted("merges", "string") and not (kind == "llama" and counted("scores", "number")):
        raise refuse("its tokenizer has no merges" + (" or scores" if kind == "llama" else ""))
    for key in ("scores", "token_type"):
        if counted(key, "number") and told[key].count != tokens.count:
            raise refuse(f"tokenizer.ggml.{key} has {told[key].count:,} items, but there are {tokens.count:,} tokens")
    for key in ("bos_token_id", "eos_token_id", "unknown_token_id", "padding_token_id"):
        if key in told and not (type(told[key]) is int and 0 <= told[key] < tokens.count):
            raise refuse(f"{start}{key} is {_shown(told[key])}, but there are {tokens.count:,} tokens")
    for key, value in told.items():
        if key.startswith("add_") and not isinstance(value, bool):
            raise refuse(f"{start}{key} is {_shown(value)}, and must be true or false")
    for key in ("tokenizer.chat_template", f"{start}pre", "general.name"):
        if not isinstance(value := gguf.metadata.get(key, ""), str):
            raise refuse(f"{key} is {_shown(value)}, and must be text")


def _shown(value: Value | None) -> str:
    """A value of the metadata in a message, on one line and short."""
    if value is None:
        return "missing"
    return f"an array of {value.count:,}" if isinstance(value, GgufArray) else f"{value!r:.80}"
