"""Compiles every kernel for Hopper without a GPU, in the dtypes of use, and prints what each needs as JSON lines.

Run by ``test_kernels_compile.py`` in a process of its own: there Triton must not interpret.
"""

import json
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kvscope.methods.kernels.block_scores import kernel as block_scores
from kvscope.methods.kernels.host_gather import kernel as host_gather
from kvscope.methods.kernels.index_topk import kernel as index_topk
from kvscope.methods.kernels.indexer_score import kernel as indexer_score
from kvscope.methods.kernels.paged_decode.kernel import DEFAULT as PAGED_DECODE
from kvscope.methods.kernels.paged_decode.kernel import (
    PACKED_DEFAULTS,
    merge_options,
    packed_piece_size,
    packed_tile_size,
)
from kvscope.methods.kernels.paged_decode.merge import merge_kernel
from kvscope.methods.kernels.paged_decode.packed import packed_split_kernel
from kvscope.methods.kernels.paged_decode.rows_kernel import append_rows_kernel, merge_rows_kernel, split_rows_kernel
from kvscope.methods.kernels.paged_decode.split import split_kernel
from kvscope.methods.kernels.select import kernel as select
from kvscope.methods.kernels.token_rows import kernel as rows_of_a_token
from kvscope.methods.kv_format import FORMATS, PagePacking


def compile_kernel(name, function, constants, *, pointers, num_warps=4, num_stages=3, maxnreg=None, aligned=()):
    """Compile with these constants; ``pointers`` gives the element types, and everything else is int32."""
    names = function.arg_names
    types = {n: "constexpr" if n in constants else f"*{pointers[n]}" if n in pointers else "i32" for n in names}
    types.update({n: "fp32" for n in ("scale", "softcap", "eps") if n in types})
    source = ASTSource(
        fn=function,
        signature=types,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in (*pointers, *aligned) if n in names},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found = {"name": name, "shared_bytes": made.metadata.shared, "ptx": _counts(made.asm["ptx"])}
    sys.stdout.write(json.dumps(found) + "\n")


def _counts(ptx):
    return {
        "async_copies": ptx.count("cp.async.cg.shared.global") + ptx.count("cp.async.ca.shared.global"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "dependent_waits": ptx.count("griddepcontrol.wait"),
        "prefetches": ptx.count("prefetch.global.L2"),
        "maxima": ptx.count("max.f32"),
    }


def decode(dtype="bf16", **changes):
    """paged_decode's first kernel, as for Llama-3.1-8B unless changed."""
    constants = {
        "G": 4, "G_PAD": 16, "D": 128, "D_PAD": 128, "P": 64, "N": 64, "COUNTS": 2, "MIN_TILES": 4, "HAS_TABLE": True,
        "HAS_TOKENS": False, "HAS_SOFTCAP": False, "DEVICE_LENGTHS": True, "PRECISION": "ieee", "DEPENDENT": True,
        **changes,
    }  # fmt: skip
    pointers = {"q_ptr": dtype, "pages_ptr": dtype, "table_ptr": "i32", "tokens_ptr": "i32", "lengths_ptr": "i32"}
    compile_kernel(
        f"decode {dtype} {changes}",
        split_kernel,
        constants,
        pointers={**pointers, "out_ptr": "fp32", "lse_ptr": "fp32"},
        num_stages=PAGED_DECODE.num_stages,
        aligned=("stride_qb", "stride_qh"),
    )


def packed(kv, dtype="bf16", **changes):
    """paged_decode's first kernel over packed pages, as for Llama-3.1-8B unless changed."""
    packing, tuning = PagePacking(FORMATS[kv], 64, 128), PACKED_DEFAULTS[kv]
    constants = {
        "G": 4, "G_PAD": 8, "D": 128, "C_PAD": packed_piece_size(packing), "P": 64, "N": packed_tile_size(packing),
        "GROUP": packing.key_group_tokens, "BITS": packing.format.bits, "IS_FLOAT": packing.format.is_float,
        "RECORD": packing.record_bytes, "COUNTS": 2, "MIN_TILES": 4, "HAS_TABLE": True,
        "HAS_SOFTCAP": False, "DEVICE_LENGTHS": True, "OPERAND": tl.float16, "ASSEMBLY": True, "CONVERTS": True,
        "PRECISION": "ieee", "LANES": 32 * tuning.num_warps, "DEPENDENT": True,
        **changes,
    }  # fmt: skip
    pointers = {
        "q_ptr": dtype,
        "pages_ptr": "i16",
        "numbers_ptr": "fp16",
        "pairs_ptr": "i32",
        "table_ptr": "i32",
        "lengths_ptr": "i32",
    }
    compile_kernel(
        f"packed {kv} {dtype} {changes}",
        packed_split_kernel,
        constants,
        pointers={**pointers, "out_ptr": "fp32", "lse_ptr": "fp32"},
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.max_registers,
        aligned=("stride_qb", "stride_qh"),
    )


def rows(dtype="bf16", **changes):
    """paged_decode's kernels over sequences with pages of their own."""
    constants = {
        "G": 4, "G_PAD": 16, "D": 128, "D_PAD": 128, "P": 64, "N": 64, "COUNTS": 64, "MIN_TILES": 4, "HAS_TABLE": False,
        "HAS_TOKENS": False, "HAS_TURNED": False, "HAS_SOFTCAP": False, "PRECISION": "ieee", "PART": 0,
        "DEPENDENT": True, **changes,
    }  # fmt: skip
    pointers = {
        "q_ptr": dtype, "turned_ptr": dtype, "anchor_ptr": dtype, "ints_ptr": "i32", "table_ptr": "i64",
        "out_ptr": "fp32", "lse_ptr": "fp32",
    }  # fmt: skip
    stages = PAGED_DECODE.num_stages
    compile_kernel(f"rows {dtype} {changes}", split_rows_kernel, constants, pointers=pointers, num_stages=stages)


def rest_of_rows():
    """Their merge, and the store of a step's tokens."""
    constants = {
        "G": 4, "D": 128, "D_PAD": 128, "N": 64, "COUNTS": 64, "MIN_TILES": 4, "TWO_STORES": True, "HAS_SINK": True,
        "MERGE_ROWS": 64, "PARTS": 1, "DEPENDENT": True,
    }  # fmt: skip
    pointers = {
        "result_ptr": "bf16", "sink_ptr": "bf16", "out_ptr": "fp32", "lse_ptr": "fp32", "ints_ptr": "i32",
        "table_ptr": "i64",
    }  # fmt: skip
    compile_kernel("rows merge", merge_rows_kernel, constants, pointers=pointers)
    pointers = {"k_ptr": "bf16", "v_ptr": "bf16", "anchor_ptr": "bf16", "ints_ptr": "i32", "table_ptr": "i64"}
    compile_kernel("rows append", append_rows_kernel, {"D": 128, "D_PAD": 128}, pointers=pointers, num_warps=1)


def merge(n_programs):
    """paged_decode's second kernel, for as many programs a row of the work."""
    options = merge_options(n_programs, 1, 128)
    constants = {
        "G": 4, "D": 128, "D_PAD": 128, "N_A": 64, "N_B": 64, "COUNTS_A": 2, "COUNTS_B": 2, "MIN_TILES": 4,
        "DEVICE_LENGTHS_A": True, "DEVICE_LENGTHS_B": False, "TWO_STORES": True, "HAS_SINK": True,
        "MERGE_ROWS": options["MERGE_ROWS"], "PARTS": options["PARTS"], "DEPENDENT": True,
    }  # fmt: skip
    pointers = dict.fromkeys(("result_lse_ptr", "out_a", "lse_a", "out_b", "lse_b"), "fp32")
    pointers |= {"result_ptr": "bf16", "sink_ptr": "bf16", "lengths_a": "i32", "lengths_b": "i32"}
    name = f"merge of {options['MERGE_ROWS']}"
    compile_kernel(name, merge_kernel, constants, pointers=pointers, num_warps=options["num_warps"])


def indexer(*, fp8_query, early=False):
    """indexer_score at the paper's sizes; ``early``: asks for its first keys before the kernel ahead has ended."""
    constants = {
        "HEADS": 128, "HEADS_PAD": 128, "E": 128, "E_PAD": 128, "M": 128, "FP8_QUERY": fp8_query,
        "PREFETCH": 4 if early else 0, "DEPENDENT": early,
    }  # fmt: skip
    pointers = dict.fromkeys(("q_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "out_ptr"), "fp32")
    compile_kernel(
        f"indexer fp8_query={fp8_query}{' early' if early else ''}",
        indexer_score._score_kernel,
        constants,
        pointers={**pointers, "keys_ptr": "fp8e4nv"},
        num_warps=indexer_score.DEFAULT.num_warps,
        num_stages=indexer_score.DEFAULT.num_stages,
        aligned=("n_chunks",),
    )


def native_topk():
    """index_topk at DeepSeek-V4-Flash's sizes, and its scores in fp32."""
    pointers = dict.fromkeys(("count_ptr", "counts_ptr", "block_counts_ptr", "chosen_ptr"), "i32")
    pointers |= {"scores_ptr": "fp32", "weight_ptr": "fp32"}
    for dtype, tile in (("bf16", 64), ("fp32", 32)):
        constants = {"HEADS": 64, "HEADS_PAD": 64, "E": 128, "E_PAD": 128, "M": tile}
        compile_kernel(f"native scores {dtype}", index_topk._score_kernel, constants,
                       pointers={**pointers, "q_ptr": dtype, "keys_ptr": dtype}, num_stages=4)  # fmt: skip
    for level in range(index_topk.LEVELS):
        constants = {"LEVEL": level, "BLOCK": 2048}
        compile_kernel(f"native histogram {level}", index_topk._histogram_kernel, constants, pointers=pointers)
    compile_kernel("native count", index_topk._count_kernel, {"BLOCK": 2048}, pointers=pointers)
    compile_kernel("native list", index_topk._list_kernel, {"BLOCK": 2048, "BLOCKS": 128}, pointers=pointers)


def token_rows():
    """token_rows at DeepSeek-V4-Flash's sizes."""
    pointers = {"x_ptr": "bf16", "out_ptr": "bf16", "weight_ptr": "fp32", "cos_ptr": "bf16", "sin_ptr": "bf16"}
    for D, has_weight in ((16_384, False), (4096, True)):
        constants = {"D": D, "D_PAD": D, "HAS_WEIGHT": has_weight}
        compile_kernel(f"norm {D}", rows_of_a_token._norm_kernel, constants, pointers=pointers, num_warps=8)
    constants = {"D": 512, "D_PAD": 512, "P": 32}
    compile_kernel("rotate", rows_of_a_token._rotate_kernel, constants, pointers=pointers, num_warps=1)


def selection():
    """The kernels of select."""
    pointers = dict.fromkeys(
        ("chosen_ptr", "n_chosen_ptr", "slot_of_chunk_ptr", "chunk_of_slot_ptr", "block_counts_ptr", "list_ptr",
         "n_list_ptr", "missing_ptr", "n_missing_ptr", "free_ptr", "table_ptr", "n_tokens_ptr"), "i32"
    )  # fmt: skip
    pointers |= {"logits_ptr": "fp32", "threshold_ptr": "fp32", "wanted_ptr": "i8"}
    for kind in range(3):
        constants = {"KIND": kind, "BLOCK": 1024, "BLOCKS": 256}
        compile_kernel(f"scatter {kind}", select._scatter_kernel, constants, pointers=pointers)
    compile_kernel("count one row", select._count_kernel, {"KIND": 0, "BLOCK": 1024, "n_rows": 1}, pointers=pointers)
    for function in (select._evict_kernel, select._fill_kernel):
        compile_kernel("slots", function, {"BLOCK": 1024}, pointers=pointers)
    compile_kernel("table", select._table_kernel, {"SLOTS_A_CHUNK": 2, "BLOCK": 1024}, pointers=pointers)


def others():
    """host_gather and block_scores."""
    pointers = dict.fromkeys(("mirror_ptr", "slots_ptr", "chunks_ptr", "chunk_slots_ptr", "n_ptr"), "i32")
    pointers["layers_ptr"] = "i64"
    for parts, pieces in ((1, 1), (4, 4)):
        constants = {
            "UNITS_PER_CHUNK": 2, "PARTS": parts, "PIECES": pieces, "PIECE_WORDS": 8192 // parts,
            "BLOCK": 4096 // parts,
        }  # fmt: skip
        compile_kernel("gather", host_gather._gather_kernel, constants, pointers=pointers, num_warps=8)
    sizes = {"G": 4, "G_PAD": 16, "D": 128, "D_PAD": 128}
    pointers = {"q_ptr": "bf16", "summaries_ptr": "bf16", "pages_ptr": "bf16", "out_ptr": "fp32"}
    for bounds in (True, False):
        constants = {**sizes, "N": 64, "BOUNDS": bounds}
        compile_kernel(f"summaries {bounds}", block_scores._summary_kernel, constants, pointers=pointers)
    for block in (16, 512):
        constants = {**sizes, "P": 64, "T": 128, "BLOCK": block}
        compile_kernel(f"msa {block}", block_scores._best_key_kernel, constants, pointers=pointers, num_stages=4)


if __name__ == "__main__":
    decode()
    decode(P=16, COUNTS=256, HAS_SOFTCAP=True, HAS_TOKENS=True)
    decode(dtype="fp32", N=32, HAS_TABLE=False, DEVICE_LENGTHS=False, DEPENDENT=False)
    for kv in FORMATS:
        # One format stands for what the others have no part in.
        packed(kv, **({"dtype": "fp16", "HAS_SOFTCAP": True} if kv == "int8" else {}))
    packed("fp8", CONVERTS=False)  # as before compute capability 8.9
    rows()
    rows(P=0, N=128, COUNTS=512, HAS_TABLE=True, HAS_TOKENS=True, HAS_TURNED=True, PART=4)
    rest_of_rows()
    merge(33)
    merge(198)
    indexer(fp8_query=True)
    indexer(fp8_query=False)
    indexer(fp8_query=True, early=True)
    native_topk()
    token_rows()
    selection()
    others()
