"""What a tile of packed decode costs in instructions: compiled for Hopper and disassembled, with no GPU.

    python benchmarks/packed_instructions.py [--out FILE]

At Llama-3.1-8B's shape. Instructions are those of the loop over tiles, as a warp issues them, times the warps of a
program, for 64 tokens. Where a kernel does not wait for memory, they bound it: a multiprocessor issues four a cycle.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvscope.methods.kernels.paged_decode.kernel import DEFAULT, PACKED_DEFAULTS, PackedTuning, packed_tile_size
from kvscope.methods.kernels.paged_decode.packed import packed_split_kernel
from kvscope.methods.kernels.paged_decode.split import split_kernel
from kvscope.methods.kv_format import FORMATS, PagePacking

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PAGE_TOKENS, HEAD_DIM = 64, 128
_SHARED = {
    "G": 4, "D": HEAD_DIM, "P": PAGE_TOKENS, "COUNTS": 2, "MIN_TILES": 4, "HAS_TABLE": True,
    "HAS_SOFTCAP": False, "DEVICE_LENGTHS": True, "PRECISION": "ieee", "DEPENDENT": True,
}  # fmt: skip
_POINTERS = {"table_ptr": "i32", "lengths_ptr": "i32", "q_ptr": "bf16", "out_ptr": "fp32", "lse_ptr": "fp32"}
#: The loop over tiles is the innermost one of more than so many instructions.
_LEAST_LOOP = 120


def compiled(function: Any, constants: dict[str, Any], pointers: dict[str, str], **options: Any) -> Any:
    """Return a kernel compiled for compute capability 9.0."""
    names, pointers = function.arg_names, _POINTERS | pointers
    kinds = {n: "constexpr" if n in constants else f"*{pointers[n]}" if n in pointers else "i32" for n in names}
    kinds |= dict.fromkeys(("scale", "softcap"), "fp32")
    source = ASTSource(
        fn=function,
        signature=kinds,
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, "stride_qb", "stride_qh") if n in names
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def row_of(name: str, made: Any, *, tile_tokens: int, warps: int, stages: int) -> dict[str, Any]:
    """Return instructions of the loop by kind, registers, spilled bytes and shared memory of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        used = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "--dump-resource-usage", file.name))
    assert used is not None
    loop = tile_loop(text)
    kinds = Counter(re.sub(r"^@!?U?P\w+\s+", "", each).split()[0].split(".")[0] for each in loop)
    return {
        "kernel": name, "tile_tokens": tile_tokens, "num_warps": warps, "num_stages": stages,
        "instructions_64_tokens": len(loop) * warps * 64 // tile_tokens, "instructions_warp": len(loop),
        "registers": int(used[1]), "stack_bytes": int(used[2]), "shared_bytes": made.metadata.shared,
        "kinds": dict(kinds.most_common(12)),
    }  # fmt: skip


def tile_loop(text: str) -> list[str]:
    """Return the instructions of the loop over tiles in a disassembly: the shortest of the long ones."""
    labels: dict[str, int] = {}
    found: list[str] = []
    loops = []
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            found.append(instruction[1].strip())
            back = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", found[-1])
            if back and back[1] in labels:
                loops.append(found[labels[back[1]] :])
    return min((loop for loop in loops if len(loop) > _LEAST_LOOP), key=len)


def _run(tool: str, *words: str) -> str:
    return subprocess.run([str(TOOLS / tool), *words], capture_output=True, text=True, check=True).stdout


def packed_row(kv: str, tuning: PackedTuning) -> dict[str, Any]:
    """The row of a format."""
    packing = PagePacking(FORMATS[kv], PAGE_TOKENS, HEAD_DIM)
    tile_tokens = packed_tile_size(packing, tuning)
    constants = _SHARED | {
        "G_PAD": 8, "C_PAD": packing.token_bytes // 2, "N": tile_tokens, "GROUP": packing.key_group_tokens,
        "BITS": packing.format.bits, "IS_FLOAT": packing.format.is_float, "RECORD": packing.record_bytes,
        "OPERAND": tl.float16, "ASSEMBLY": True, "CONVERTS": True, "LANES": 32 * tuning.num_warps,
    }  # fmt: skip
    pointers = {"pages_ptr": "i16", "numbers_ptr": "fp16", "pairs_ptr": "i32"}
    warps, stages = tuning.num_warps, tuning.num_stages
    options = {"num_warps": warps, "num_stages": stages, "maxnreg": tuning.max_registers}
    made = compiled(packed_split_kernel, constants, pointers, **options)
    return row_of(kv, made, tile_tokens=tile_tokens, warps=warps, stages=stages)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a kernel; write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    constants = _SHARED | {"G_PAD": 16, "D_PAD": HEAD_DIM, "N": 64, "HAS_TOKENS": False}
    warps, stages = DEFAULT.num_warps, DEFAULT.num_stages
    raw = compiled(
        split_kernel, constants, {"pages_ptr": "bf16", "tokens_ptr": "i32"}, num_warps=warps, num_stages=stages
    )
    rows = [row_of("bf16", raw, tile_tokens=64, warps=warps, stages=stages)]
    for kv in FORMATS:
        rows += [packed_row(kv, each) for each in (PACKED_DEFAULTS[kv], PackedTuning(tile_tokens=32, num_stages=3))]
    for row in rows:
        print(
            f"{row['kernel']:6} {row['num_warps']} warps, {row['num_stages']} stages: "
            f"{row['instructions_64_tokens']:5} instructions for 64 tokens, {row['registers']} registers, "
            f"{row['stack_bytes']} bytes spilled"
        )
    if given.out is not None:
        result = {"benchmark": "packed_instructions", "triton": triton.__version__, "target": "sm_90", "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
