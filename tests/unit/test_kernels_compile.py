"""Kernels compile for a GPU that is not at hand, and keep their sums in registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
pytestmark = pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this triton has no ptxas")

COMPILE = """
import json, sys
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from l2kv.kernels import statistics

def compiled(kernel, dtype, head_dim, width, **constants):
    query = torch.empty(1, 1, 1, head_dim, dtype=dtype)
    blocks = statistics._Blocks.of(query, width)
    tile = {"QUERIES": blocks.tile, "KEYS": blocks.keys}
    if kernel is statistics._rows_kernel:
        tile = {"KEYS": blocks.tile, "QUERIES": blocks.queries, "ENDS": triton.cdiv(blocks.queries, width)}
    constants |= tile | {"HEAD_DIM": head_dim, "WIDE": triton.next_power_of_2(head_dim)}
    constants |= {"query_number": 1, "key_number": 1}  # as launched: strides of 1 are constants
    pointers = dict.fromkeys(("query", "key"), {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[
        str(dtype).removeprefix("torch.")]) | dict.fromkeys(("sinks", "log_sums", "rows"), "*fp32")
    names = pointers | dict.fromkeys(("scale", "cap"), "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: names.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name.endswith(("_head", "_token"))]
    constants = {name: value for name, value in constants.items() if name in signature}
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)

dtype, head_dim, width, capped = json.loads(sys.argv[2])
for kernel in (statistics._log_sums_kernel, statistics._rows_kernel):
    sinks = {"SINKS": capped} if kernel is statistics._log_sums_kernel else {}
    binary = compiled(kernel, getattr(torch, dtype), head_dim, width, CAPPED=capped, **sinks).asm["cubin"]
    open(f"{sys.argv[1]}/{kernel.__name__}.cubin", "wb").write(binary)
"""


STEP = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from l2kv.kernels import ragged

dtype, width, group = json.loads(sys.argv[2])
number = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[dtype]
POINTERS = dict.fromkeys(("query", "keys", "values", "new_keys", "new_values", "output"), number)
POINTERS |= dict.fromkeys(("starts", "held", "kept", "chunk_heads", "chunk_firsts", "bounds"), "*i32")
POINTERS |= dict.fromkeys(("sums", "log_sums", "sinks", "scores"), "*fp32") | dict.fromkeys(("ranks", "seen"), "*i64")
SIZES = {"WIDTH": width, "VALUE_WIDTH": width, "WIDTH_PADDED": width, "VALUES_PADDED": width, "PADDED": width,
         "GROUP": group, "GROUP_PADDED": 16, "CHUNK": 512, "CAPPED": True, "SINKS": True, "RANKED": True,
         "PRECISION": "ieee" if dtype == "float32" else "tf32"}
for kernel, block, warps in ((ragged._attend_to_chunk, ragged._BLOCK, ragged._WARPS), (ragged._join_chunks, 32, 4),
                             (ragged._append, 0, 1), (ragged._evict, ragged._SCAN, 8)):
    constants = {name: value for name, value in (SIZES | {"BLOCK": block}).items() if name in kernel.arg_names}
    names = POINTERS | dict.fromkeys(("scale", "softcap"), "fp32") | dict.fromkeys(constants, "constexpr")
    signature = {name: names.get(name, "i32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names)
               if signature[name][0] == "*" or name.endswith(("_row", "_head", "_slot"))}
    options = {"num_warps": warps, "num_stages": ragged._STAGES}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
    open(f"{sys.argv[1]}/{kernel.__name__}.cubin", "wb").write(binary)
"""


@pytest.mark.parametrize(
    "shape", [("bfloat16", 128, 256, False), ("float16", 80, 2, True), ("float32", 64, 16, False)], ids=str
)
def test_statistics_compile_for_hopper_and_spill_nothing(shape, tmp_path):
    assert len(spill_nothing(COMPILE, shape, tmp_path)) == 2


@pytest.mark.parametrize("shape", [("bfloat16", 128, 4), ("float16", 64, 3)], ids=str)
def test_a_decoding_step_compiles_for_hopper_and_spills_nothing(shape, tmp_path):
    assert len(spill_nothing(STEP, shape, tmp_path)) == 4


def spill_nothing(code, shape, folder):
    """Binaries that `code` writes into a folder; none of them keeps registers in memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    run = [sys.executable, "-c", code, str(folder), json.dumps(shape)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    binaries = sorted(folder.glob("*.cubin"))
    for binary in binaries:
        dump = [TOOLS / "cuobjdump", "--dump-resource-usage", binary]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert " STACK:0 " in usage and " LOCAL:0 " in usage, (binary.name, usage)
    return binaries
