"""What packed decode takes of a multiprocessor: compiled for Hopper and disassembled, with no GPU.

    python benchmarks/packed_instructions.py [--out FILE] [--only int4] [--all]

At Llama-3.1-8B's shape: each format's default, or all of ``packed_space.py``. Instructions are those of the loop over
tiles, as a warp issues them, times the warps of a program, for 64 tokens. Registers and shared memory say how many
warps a multiprocessor holds. Counts depend on the version of Triton: a file keeps those of others.
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
from packed_space import HEAD_DIM, PAGE_TOKENS, programs_that_fit, tunings
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvscope.methods.kernels.paged_decode.kernel import DEFAULT, PackedTuning, packed_piece_size, packed_tile_size
from kvscope.methods.kernels.paged_decode.packed import packed_split_kernel
from kvscope.methods.kernels.paged_decode.split import split_kernel
from kvscope.methods.kv_format import FORMATS, PagePacking

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_SHARED = {
    "G": 4, "D": HEAD_DIM, "P": PAGE_TOKENS, "COUNTS": 2, "MIN_TILES": 4, "HAS_TABLE": True,
    "HAS_SOFTCAP": False, "DEVICE_LENGTHS": True, "PRECISION": "ieee", "DEPENDENT": True,
}  # fmt: skip
_POINTERS = {"table_ptr": "i32", "lengths_ptr": "i32", "q_ptr": "bf16", "out_ptr": "fp32", "lse_ptr": "fp32"}
#: The loop over tiles is the innermost one of more than so many instructions.
_LEAST_LOOP = 120
#: Copies to shared memory, loads and stores of it, and those of spilled registers.
_MEMORY = ("LDGSTS", "LDSM", "LDS", "STS", "STSM", "LDL", "STL")


def compiled(function: Any, constants: dict[str, Any], pointers: dict[str, str], **options: Any) -> Any:
    """Return a kernel compiled for compute capability 9.0."""
    names, pointers = function.arg_names, _POINTERS | pointers
    kinds = {n: "constexpr" if n in constants else f"*{pointers[n]}" if n in pointers else "i32" for n in names}
    kinds |= dict.fromkeys([n for n in ("scale", "softcap") if n in names], "fp32")
    source = ASTSource(
        fn=function,
        signature=kinds,
        constexprs={(names.index(n),): value for n, value in constants.items() if n in names},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, "stride_qb", "stride_qh") if n in names
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def row_of(name: str, made: Any, *, tile_tokens: int, **more: Any) -> dict[str, Any]:
    """Return instructions of the loop by kind, and what a compiled kernel takes."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = _run("nvdisasm", "-c", file.name)
        used = re.search(r"REG:(\d+) STACK:(\d+)", _run("cuobjdump", "--dump-resource-usage", file.name))
    assert used is not None
    loop = tile_loop(text)
    kinds = Counter(re.sub(r"^@!?U?P\w+\s+", "", each).split()[0].split(".")[0] for each in loop)
    warps, shared_bytes = made.metadata.num_warps, made.metadata.shared
    fit = programs_that_fit(registers=int(used[1]), shared_bytes=shared_bytes, num_warps=warps)
    return {
        "triton": triton.__version__, "kernel": name, "tile_tokens": tile_tokens, "num_warps": warps,
        "num_stages": made.metadata.num_stages, **more,
        "instructions_64_tokens": len(loop) * warps * 64 // tile_tokens, "instructions_warp": len(loop),
        "registers": int(used[1]), "stack_bytes": int(used[2]), "shared_bytes": shared_bytes, "programs_per_sm": fit,
        "warps_per_sm": fit * warps, "memory_instructions": {kind: kinds[kind] for kind in _MEMORY if kinds[kind]},
        "kinds": dict(kinds.most_common(6)),
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
        "G_PAD": 8, "C_PAD": packed_piece_size(packing, tuning), "N": tile_tokens, "GROUP": packing.key_group_tokens,
        "BITS": packing.format.bits, "IS_FLOAT": packing.format.is_float, "RECORD": packing.record_bytes,
        "OPERAND": tl.float16, "ASSEMBLY": True, "CONVERTS": True, "LANES": 32 * tuning.num_warps,
    }  # fmt: skip
    pointers = {"pages_ptr": "i16", "numbers_ptr": "fp16", "pairs_ptr": "i32"}
    options = {"num_warps": tuning.num_warps, "num_stages": tuning.num_stages, "maxnreg": tuning.max_registers}
    made = compiled(packed_split_kernel, constants, pointers, **options)
    more = {"max_registers": tuning.max_registers, "piece_words": tuning.piece_words}
    return row_of(kv, made, tile_tokens=tile_tokens, **more)


def raw_row() -> dict[str, Any]:
    """The row of the kernel over bf16 pages."""
    constants = _SHARED | {"G_PAD": 16, "D_PAD": HEAD_DIM, "N": 64, "HAS_TOKENS": False}
    options = {"num_warps": DEFAULT.num_warps, "num_stages": DEFAULT.num_stages}
    made = compiled(split_kernel, constants, {"pages_ptr": "bf16", "tokens_ptr": "i32"}, **options)
    return row_of("bf16", made, tile_tokens=64)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, one a line; keep those of other versions of Triton, and of kernels before."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = [row for row in held.get("rows", []) if row["triton"] != triton.__version__]
    result = {"benchmark": "packed_instructions", "target": "sm_90"}
    lists = {"rows": [*kept, *rows], "rows_before": held.get("rows_before", [])}
    parts = [f' "{name}": {json.dumps(value)}' for name, value in result.items()]
    for name, each in lists.items():
        parts.append(f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in each) + "\n ]")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line a kernel; write all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", action="append", choices=list(FORMATS))
    parser.add_argument("--all", action="store_true", help="every variant of packed_space.py, not the defaults alone")
    given = parser.parse_args(arguments)
    rows = []
    todo = [(kv, each) for kv in given.only or FORMATS for each in tunings(kv)[: None if given.all else 1]]
    for kv, tuning in (("bf16", None), *todo):
        row = raw_row() if tuning is None else packed_row(kv, tuning)
        rows.append(row)
        print(
            f"{kv:6} {row['tile_tokens']} tokens, {row['num_warps']} warps, {row['num_stages']} stages, "
            f"{row.get('piece_words', 'all')} words: "
            f"{row['instructions_64_tokens']:5} instructions for 64 tokens, {row['registers']} registers, "
            f"{row['stack_bytes']} bytes spilled, {row['shared_bytes']} shared, {row['warps_per_sm']} warps fit",
            flush=True,
        )
    if given.out is not None:
        write(given.out, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
