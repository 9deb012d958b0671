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


@pytest.mark.parametrize(
    "shape", [("bfloat16", 128, 256, False), ("float16", 80, 2, True), ("float32", 64, 16, False)], ids=str
)
def test_statistics_compile_for_hopper_and_spill_nothing(shape, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    run = [sys.executable, "-c", COMPILE, str(tmp_path), json.dumps(shape)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    binaries = sorted(tmp_path.glob("*.cubin"))
    assert len(binaries) == 2
    for binary in binaries:
        dump = [TOOLS / "cuobjdump", "--dump-resource-usage", binary]
        usage = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
        assert " STACK:0 " in usage and " LOCAL:0 " in usage, usage
