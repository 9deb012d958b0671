"""A GGUF file put together byte by byte, from the format's description: nothing is shared with what reads it."""

import struct

U8, U32, I32, F32, BOOL, STRING, ARRAY, U64 = 0, 4, 5, 6, 7, 8, 9, 10
HUGE = 2**60
Key = tuple[str | bytes, int, bytes]


def text(value: str | bytes) -> bytes:
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def array(kind: int, *items: bytes, count: int | None = None) -> bytes:
    return struct.pack("<IQ", kind, len(items) if count is None else count) + b"".join(items)


TOKENS = 32
KEYS: dict[str | bytes, tuple[int, bytes]] = {
    "general.architecture": (STRING, text("llama")),
    "llama.block_count": (U32, u32(1)),
    "llama.context_length": (U32, u32(64)),
    "llama.embedding_length": (U32, u32(32)),
    "llama.feed_forward_length": (U32, u32(64)),
    "llama.attention.head_count": (U32, u32(4)),
    "llama.attention.head_count_kv": (U32, u32(2)),
    "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 1e-5)),
    "llama.rope.freq_base": (F32, struct.pack("<f", 1e4)),
    "tokenizer.ggml.model": (STRING, text("gpt2")),
    "tokenizer.ggml.pre": (STRING, text("gpt-2")),
    "tokenizer.ggml.tokens": (ARRAY, array(STRING, *(text(chr(65 + i)) for i in range(TOKENS - 1)), text("AB"))),
    "tokenizer.ggml.token_type": (ARRAY, array(I32, *[u32(1)] * TOKENS)),
    "tokenizer.ggml.merges": (ARRAY, array(STRING, text("A B"))),
    "tokenizer.ggml.bos_token_id": (U32, u32(1)),
}
NORM = ("output_norm.weight", (32,), 0)
TENSORS = [  # name, dimensions with the fastest first, type
    ("token_embd.weight", (32, TOKENS), 0),
    NORM,
    ("blk.0.attn_norm.weight", (32,), 0),
    ("blk.0.ffn_norm.weight", (32,), 0),
    ("blk.0.attn_q.weight", (32, 32), 0),
    ("blk.0.attn_k.weight", (32, 16), 0),
    ("blk.0.attn_v.weight", (32, 16), 0),
    ("blk.0.attn_output.weight", (32, 32), 0),
    ("blk.0.ffn_gate.weight", (32, 64), 8),
    ("blk.0.ffn_up.weight", (32, 64), 8),
    ("blk.0.ffn_down.weight", (64, 32), 8),
]


def key_values(keys: dict) -> bytes:
    return b"".join(text(key) + u32(kind) + value for key, (kind, value) in keys.items())


def with_keys(**changes: tuple[int, bytes] | None) -> dict:
    """The keys with some in place of others; __ stands for a dot, and None leaves one out."""
    changed = KEYS | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in changed.items() if value is not None}


def nbytes(dims: tuple[int, ...], kind: int) -> int:
    block, size = {0: (1, 4), 8: (32, 34)}.get(kind, (1, 1))
    total = 1
    for dim in dims:
        total *= dim
    return total // block * size


def build(
    keys: bytes | dict = KEYS,
    tensors: list | None = None,
    *,
    magic: bytes = b"GGUF",
    version: bytes = u32(3),
    n_keys: int | None = None,
    n_tensors: int | None = None,
    offsets: dict[str, int] | None = None,
    raw: dict[str, bytes] | None = None,
    alignment: int = 32,
) -> bytes:
    """A file.

    Args:
        offsets: where some tensors are, after where the data begin.
        raw: what the table says of some tensors, after their names.
    """
    tensors = TENSORS if tensors is None else tensors
    if isinstance(keys, dict):
        n_keys, keys = len(keys) if n_keys is None else n_keys, key_values(keys)
    table, at = b"", 0
    for name, dims, kind in tensors:
        place = (offsets or {}).get(name, at)
        entry = u32(len(dims)) + struct.pack(f"<{len(dims)}Q", *dims) + u32(kind) + struct.pack("<Q", place)
        table += text(name) + (raw or {}).get(name, entry)
        at += -(-nbytes(dims, kind) // alignment) * alignment if max(dims, default=0) < 10**6 else 0
    counts = struct.pack("<QQ", len(tensors) if n_tensors is None else n_tensors, n_keys)
    header = magic + version + counts + keys + table
    return header + bytes(-len(header) % alignment) + bytes(at)


def header_of(name: str) -> int:
    """The byte after the name of a tensor in the table of a whole file."""
    return build().index(text(name)) + len(text(name))


def no_key(name: str) -> bytes:
    return build(with_keys(**{name.replace(".", "__"): None}))


def with_tensor(*dims: int, kind: int = 0, name: str = "blk.0.attn_q.weight") -> bytes:
    return build(tensors=[(n, dims if n == name else d, kind if n == name else k) for n, d, k in TENSORS])


def with_value(key: str, kind: int, value: bytes) -> bytes:
    return build(KEYS | {key: (kind, value)})


WHOLE = build()
DATA = sum(-(-nbytes(dims, kind) // 32) * 32 for _, dims, kind in TENSORS)
TENSOR_TABLE = header_of("token_embd.weight") - len(text("token_embd.weight"))
