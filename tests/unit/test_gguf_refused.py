"""Every hostile, torn or foreign GGUF file ends in a ModelError of one line that says why, soon and in little memory.

The files are put together here byte by byte, from the format's description: nothing is shared with what reads them.
"""

import json
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from analysis.errors import ModelError
from analysis.models.gguf import read_gguf
from tests.support.gguf_bytes import (
    ARRAY,
    BOOL,
    DATA,
    F32,
    HUGE,
    I32,
    KEYS,
    NORM,
    STRING,
    TENSOR_TABLE,
    TENSORS,
    U8,
    U32,
    U64,
    WHOLE,
    array,
    build,
    header_of,
    key_values,
    no_key,
    text,
    u32,
    with_tensor,
    with_value,
)
from tests.support.paths import ROOT

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    # torn
    "empty": (lambda: b"", "it is cut off in the magic: 4 bytes are needed at byte 0, 0 are left"),
    "torn in the magic": (lambda: b"GG", "the magic"),
    "torn in the version": (lambda: WHOLE[:6], "the version"),
    "torn in the counts": (lambda: WHOLE[:14], "the number of tensors"),
    "torn before the keys": (lambda: WHOLE[:24], "the name of key 0"),
    "torn in a key": (lambda: WHOLE[:40], "the name of key 0: 20 bytes are needed at byte 32, 8 are left"),
    "torn in a type": (lambda: WHOLE[:54], "the type of 'general.architecture'"),
    "torn in a string": (lambda: WHOLE[:66], "'general.architecture': 5 bytes"),
    "torn in a number": (lambda: WHOLE[: WHOLE.index(b"freq_base") + 14], "'llama.rope.freq_base': 4 bytes"),
    "torn in the tokens": (lambda: WHOLE[: WHOLE.index(b".token_type") - 150], "'tokenizer.ggml.tokens'"),
    "torn in an array": (lambda: WHOLE[: WHOLE.index(b".token_type") + 60], "'tokenizer.ggml.token_type': 128"),
    "torn before the table": (lambda: WHOLE[:TENSOR_TABLE], "the length of the name of tensor 0"),
    "torn in the table": (lambda: WHOLE[: header_of("blk.0.attn_q.weight") + 7], "the tensor 'blk.0.attn_q.weight'"),
    "torn in the data": (lambda: WHOLE[: len(WHOLE) - DATA + 100], "'token_embd.weight' ends at byte"),
    "torn in the last tensor": (lambda: WHOLE[:-1], "'blk.0.ffn_down.weight' ends at byte"),
    # what it is
    "a pickle": (lambda: b"\x80\x04\x95" + WHOLE, "it does not begin with GGUF"),
    "an archive": (lambda: b"PK\x03\x04" + WHOLE[4:], "it is not a GGUF file"),
    "another magic": (lambda: build(magic=b"GGML"), "it does not begin with GGUF"),
    "version 0": (lambda: build(version=u32(0)), "version 0"),
    "version 1": (lambda: build(version=u32(1)), "version 1; versions 2 and 3 are supported. Convert"),
    "version 4": (lambda: build(version=u32(4)), "version 4"),
    "big-endian": (lambda: build(version=struct.pack(">I", 3)), "big-endian"),
    # counts
    "2^64 - 1 keys": (lambda: build(n_keys=2**64 - 1), "18,446,744,073,709,551,615 keys"),
    "a million keys": (
        lambda: build({f"k{i}": (U8, b"\0") for i in range(10**6)} | KEYS),
        "1,000,015 keys, which is out of range",
    ),
    "2^60 tensors": (lambda: build(n_tensors=HUGE), "1,152,921,504,606,846,976 tensors"),
    "a key more than there are": (lambda: build(n_keys=len(KEYS) + 1), "the name of tensor 0 is a string"),
    "a key fewer than there are": (lambda: build(n_keys=len(KEYS) - 1), "'tokenizer.ggml.bos_token_id'"),
    "a tensor more than there are": (lambda: build(n_tensors=len(TENSORS) + 1), "the tensor '' has 0 dim"),
    "no tensors": (lambda: build(tensors=[]), "no tensors"),
    "no keys": (lambda: build({}), "its architecture is missing"),
    # keys
    "a key of 2^60 bytes": (lambda: build(struct.pack("<Q", HUGE), n_keys=1), "a string of 1,152,921,504,606,846,976"),
    "a key that is no text": (lambda: build(KEYS | {b"\xff\xfe": (U8, b"\0")}), "not text in UTF-8"),
    "a key twice": (lambda: build(key_values(KEYS) * 2, n_keys=2 * len(KEYS)), "'general.architecture' appears twice"),
    "keys of 8 MB": (lambda: build({"k" * 9000 + str(i): (U8, b"\0") for i in range(900)}), "more than 4,194,304"),
    # values
    "a string of 2^60 bytes": (lambda: with_value("x", STRING, struct.pack("<Q", HUGE)), "'x' is a string of 1,152"),
    "a string beyond the file": (
        lambda: with_value("x", STRING, struct.pack("<Q", 2**19)),
        "'x': 524,288 bytes",
    ),
    "a string that is no text": (lambda: with_value("x", STRING, text(b"\xc3\x28")), "'x' is not text in UTF-8"),
    "text of 10 MB": (
        lambda: build(KEYS | {f"x{i}": (STRING, text("x" * 10**6)) for i in range(10)}),
        "more than 4,194,304 bytes",
    ),
    "a type that is none": (lambda: with_value("x", 13, b"\0" * 8), "'x' has type 13"),
    "a bool of 2": (lambda: with_value("x", BOOL, b"\2"), "'x' is 2, which is neither true nor false"),
    "an array of arrays": (lambda: with_value("x", ARRAY, array(ARRAY, array(U8, b"\0"))), "an array of arrays"),
    "arrays nested 10,000 deep": (
        lambda: with_value("x", ARRAY, struct.pack("<IQ", ARRAY, 1) * 10_000 + array(U8, b"\0")),
        "an array of arrays",
    ),
    "an array of a type that is none": (lambda: with_value("x", ARRAY, array(99, b"\0")), "array of type 99"),
    "an array of 2^60 numbers": (lambda: with_value("x", ARRAY, array(U64, count=HUGE)), "9,223,372,036,854,775,808"),
    "an array of 2^60 strings": (lambda: with_value("x", ARRAY, array(STRING, count=HUGE)), "strings, and at most"),
    "an array of a million strings that are not there": (
        lambda: with_value("x", ARRAY, array(STRING, count=10**6)),
        "'x': 8,000,000 bytes",
    ),
    "a string of 2^60 bytes in an array": (
        lambda: with_value("x", ARRAY, array(STRING, text("a"), struct.pack("<Q", HUGE), count=2)),
        "item 1 of 'x' is a string of 1,152",
    ),
    "a string beyond the file in an array": (
        lambda: with_value("x", ARRAY, array(STRING, text("a"), struct.pack("<Q", 2**19), count=2)),
        "item 1 of 'x' ends beyond",
    ),
    "a thousand lists of a thousand": (
        lambda: build(KEYS | {f"x{i}": (ARRAY, array(U8, bytes(1000), count=1000)) for i in range(1000)}),
        "more than 4,194,304 bytes",
    ),
    "infinite": (lambda: with_value("llama.rope.freq_base", F32, struct.pack("<f", float("inf"))), "freq_base' is inf"),
    "no number": (lambda: with_value("x", F32, struct.pack("<f", float("nan"))), "'x' is nan"),
    # alignment
    "alignment 0": (lambda: with_value("general.alignment", U32, u32(0)), "general.alignment is 0"),
    "alignment 48": (lambda: with_value("general.alignment", U32, u32(48)), "general.alignment is 48"),
    "alignment 2^31": (lambda: with_value("general.alignment", U32, u32(2**31)), "general.alignment is 2147483648"),
    "alignment of text": (lambda: with_value("general.alignment", STRING, text("32")), "general.alignment is '32'"),
    # the table of tensors
    "a tensor of no dimensions": (lambda: with_tensor(), "has 0 dimensions"),
    "a tensor of 2^32 - 1 dimensions": (
        lambda: build(raw={"output_norm.weight": u32(2**32 - 1)}),
        "has 4294967295 dimensions",
    ),
    "a tensor of nothing": (lambda: with_tensor(32, 0), "has dimensions [32, 0]"),
    "dimensions that overflow to 0": (lambda: with_tensor(2**32, 2**32), "ends at byte 73,786,976,294,838,2"),
    "dimensions that overflow to 32": (lambda: with_tensor(2**62, 4, 2**3, 32), "ends at byte"),
    "2^63 rows": (lambda: with_tensor(32, 2**63), "ends at byte"),
    "a row that is no whole number of blocks": (lambda: with_tensor(31, 32, kind=8), "in blocks of 32"),
    "a type that cannot be dequantised": (lambda: with_tensor(32, 32, kind=27), "has type 27"),
    "a type that is gone": (lambda: with_tensor(32, 32, kind=4), "has type 4,"),
    "an offset beyond the file": (lambda: build(offsets={NORM[0]: 2**40}), "'output_norm.weight' ends at byte"),
    "an offset of 2^64 - 32": (lambda: build(offsets={NORM[0]: 2**64 - 32}), "'output_norm.weight' ends at byte"),
    "an offset off the alignment": (lambda: build(offsets={NORM[0]: 4097}), "not a multiple of the alignment, 32"),
    "two tensors in one place": (lambda: build(offsets={NORM[0]: 0}), "overlap"),
    "a tensor within another": (lambda: build(offsets={NORM[0]: 64}), "overlap"),
    "a tensor twice": (lambda: build(tensors=[*TENSORS, NORM]), "the tensor 'output_norm.weight' appears 2 times"),
    "a tensor whose name is no text": (lambda: build(tensors=[*TENSORS, (b"\xff", (32,), 0)]), "not text in UTF-8"),
    "a tensor's name of 2^60 bytes": (
        lambda: WHOLE[:TENSOR_TABLE] + struct.pack("<Q", HUGE) + WHOLE[TENSOR_TABLE + 8 :],
        "the name of tensor 0 is a string of",
    ),
    # what model it is
    "no architecture": (lambda: no_key("general.architecture"), "its architecture is missing"),
    "an unknown architecture": (
        lambda: with_value("general.architecture", STRING, text("t5")),
        "its architecture is 't5'; from GGUF files, these can be loaded: gemma2,",
    ),
    "an architecture that is a number": (lambda: with_value("general.architecture", U32, u32(1)), "architecture is 1"),
    "an adapter": (lambda: with_value("general.type", STRING, text("adapter")), "its type is 'adapter', not 'model'"),
    "a part of a model": (lambda: with_value("split.count", 2, b"\3\0"), "one of 3 parts of a model. Join them"),
    "no layers": (lambda: with_value("llama.block_count", U32, u32(0)), "llama.block_count is 0"),
    "a million layers": (lambda: with_value("llama.block_count", U32, u32(10**6)), "from 1 to 1024"),
    "no count of layers": (lambda: no_key("llama.block_count"), "llama.block_count is missing"),
    "a size that is negative": (lambda: with_value("llama.embedding_length", I32, b"\xff" * 4), "_length is -1"),
    "a size that is true": (lambda: with_value("llama.embedding_length", BOOL, b"\1"), "embedding_length is True"),
    "a size that is text": (lambda: with_value("llama.embedding_length", STRING, text("32")), "length is '32'"),
    "a size that is no whole number": (
        lambda: with_value("llama.embedding_length", F32, struct.pack("<f", 32)),
        "embedding_length is 32.0",
    ),
    "a size of 2^63": (lambda: with_value("llama.feed_forward_length", U64, struct.pack("<Q", 2**63)), "to 1048576"),
    "two thousand heads": (lambda: with_value("llama.attention.head_count", U32, u32(2000)), "head_count is 2000"),
    "heads that differ from layer to layer": (
        lambda: with_value("llama.attention.head_count_kv", ARRAY, array(I32, u32(2), u32(4))),
        "head_count_kv is a list of 2; layers that differ",
    ),
    "heads that 3 do not divide": (lambda: with_value("llama.attention.head_count_kv", U32, u32(3)), "its 3 kv heads"),
    "no positions": (lambda: no_key("llama.context_length"), "llama.context_length is missing"),
    "no epsilon": (lambda: no_key("llama.attention.layer_norm_rms_epsilon"), "the epsilon of its norms is missing"),
    "a head of 2^31": (lambda: with_value("llama.attention.key_length", U32, u32(2**31)), "key_length is 2147483648"),
    "experts": (lambda: with_value("llama.expert_count", U32, u32(8)), "llama.expert_count is 8"),
    "no embedding": (lambda: build(tensors=TENSORS[1:]), "token_embd.weight) is missing"),
    "an embedding that is no matrix": (
        lambda: build(tensors=[("token_embd.weight", (1024,), 0), *TENSORS[1:]]),
        "is of shape [1024]",
    ),
    # its tokenizer
    "no tokenizer": (lambda: no_key("tokenizer.ggml.tokens"), "it has no tokenizer"),
    "no kind of tokenizer": (lambda: no_key("tokenizer.ggml.model"), "its tokenizer is missing (tokenizer.ggml.model)"),
    "another kind of tokenizer": (lambda: with_value("tokenizer.ggml.model", STRING, text("bert")), "zer is 'bert'"),
    "no merges": (lambda: no_key("tokenizer.ggml.merges"), "no merges"),
    "tokens that are numbers": (
        lambda: with_value("tokenizer.ggml.tokens", ARRAY, array(U8, b"\0" * 32, count=32)),
        "tokens is an array of 32, not an array of strings",
    ),
    "tokens that are one": (lambda: with_value("tokenizer.ggml.tokens", STRING, text("a")), "tokens is 'a'"),
    "no tokens": (lambda: with_value("tokenizer.ggml.tokens", ARRAY, array(STRING)), "has 0 tokens"),
    "more tokens than rows": (
        lambda: with_value("tokenizer.ggml.tokens", ARRAY, array(STRING, *[text("a")] * 33)),
        "has 33 tokens, but its embedding has 32 rows",
    ),
    "fewer types than tokens": (
        lambda: with_value("tokenizer.ggml.token_type", ARRAY, array(I32, u32(1))),
        "token_type has 1 items, but there are 32 tokens",
    ),
    "a first token beyond the vocabulary": (
        lambda: with_value("tokenizer.ggml.bos_token_id", U32, u32(32)),
        "bos_token_id is 32, but there are 32 tokens",
    ),
    "a chat template of numbers": (lambda: with_value("tokenizer.chat_template", U32, u32(1)), "chat_template is 1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile")


def refusal(path: Path) -> str:
    with pytest.raises(ModelError) as refused:
        read_gguf(path)
    return str(refused.value)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_that_says_why(folder, name):
    content, words = HOSTILE[name]
    (path := folder / f"{name}.gguf").write_bytes(content())
    message = refusal(path)
    assert words in message
    assert message.startswith(f"{name}:") and "\n" not in message and len(message) < 500
    assert re.search(r"\. (The file is|Convert|Give|Join)[^.]*(\.cpp[^.]*)?\.$", message), (
        message
    )  # the last word is what to do


@pytest.mark.parametrize("end", range(0, len(WHOLE), 97))
def test_a_file_torn_anywhere_is_refused(folder, end):
    (path := folder / "torn.gguf").write_bytes(WHOLE[:end])
    assert refusal(path).startswith("torn: ")


MEASURE = """
import json, sys, time
from pathlib import Path
from analysis.errors import ModelError
from analysis.models.gguf import read_gguf

def resident(which):  # KiB now (VmRSS) or at the peak (VmHWM); getrusage has the peak of the parent in it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which))

told = {}
for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, begin = resident("VmRSS"), time.perf_counter()
    try:
        read_gguf(path)
        refused = False
    except ModelError:
        refused = True
    told[path.stem] = refused, time.perf_counter() - begin, resident("VmHWM") - before
heavy = [name for name in ("torch", "transformers", "numpy", "gguf") if name in sys.modules]
print(json.dumps([told, heavy]))
"""


def measured(folder: Path) -> dict[str, tuple[bool, float, int]]:
    """Of each file: whether it was refused, in how many seconds, and KiB at the peak beyond what there was."""
    run = [sys.executable, "-c", MEASURE, str(folder)]
    told, heavy = json.loads(subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert heavy == []
    return told


def test_all_are_refused_soon_in_little_memory_and_without_torch(tmp_path):
    for name, (content, _) in HOSTILE.items():
        (tmp_path / f"{name}.gguf").write_bytes(content())
    told = measured(tmp_path)
    assert len(told) == len(HOSTILE) >= 40
    assert all(refused for refused, _, _ in told.values())
    assert max(seconds for _, seconds, _ in told.values()) < 0.2
    assert max(kib for _, _, kib in told.values()) < 20 * 1024


def test_a_real_vocabulary_of_262_144_tokens_is_gone_past_soon(tmp_path):
    """As Gemma 3 has it, and the strings of its merges besides."""
    words = [f"▁word{i}" for i in range(262_144)]
    keys = KEYS | {
        "tokenizer.ggml.tokens": (ARRAY, array(STRING, *map(text, words))),
        "tokenizer.ggml.merges": (ARRAY, array(STRING, *[text("word 12345")] * 514_906)),
        "tokenizer.ggml.token_type": (ARRAY, array(I32, *[u32(1)] * 262_144)),
        "tokenizer.ggml.scores": (ARRAY, array(F32, *[b"\0" * 4] * 262_144)),
    }
    tensors = [("token_embd.weight", (32, 262_144), 0), *TENSORS[1:]]
    (tmp_path / "large.gguf").write_bytes(build(keys, tensors))
    refused, seconds, kib = measured(tmp_path)["large"]
    assert not refused and seconds < 2 and kib < 20 * 1024


def test_the_most_strings_that_are_read_take_no_longer_than_a_real_vocabulary(tmp_path):
    """As many empty ones as are allowed, in a file of holes."""
    n = 1_999_900
    head = build(KEYS | {"x": (ARRAY, array(STRING, count=n))}, [], n_tensors=1)
    with (tmp_path / "holes.gguf").open("wb") as file:
        file.write(head)
        file.truncate(len(head) + 8 * n)
    refused, seconds, kib = measured(tmp_path)["holes"]
    assert refused and seconds < 2 and kib < 20 * 1024
