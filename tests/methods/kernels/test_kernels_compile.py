"""Every kernel compiles for Hopper, in bf16 and fp8, without a GPU: the interpreter is more lenient with types."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from kvscope.methods.kernels.paged_decode.kernel import DEFAULT, PACKED_DEFAULTS, packed_tile_size
from kvscope.methods.kv_format import FORMATS, PagePacking

HOPPER_SHARED_BYTES = 227 * 1024
TRITON = tuple(int(part) for part in version("triton").split(".")[:2])


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["TRITON_DISABLE_LINE_INFO"] = "1"  # lines of the source change no code, and take a sixth of the time
    script = Path(__file__).parent / "compile_all.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_all_of_them_fit_a_multiprocessor(compiled):
    assert len(compiled) == 40
    assert all(found["shared_bytes"] <= HOPPER_SHARED_BYTES for found in compiled)


def test_all_buffers_of_paged_decode_hold_keys_and_values(compiled):
    for found in compiled:
        if found["name"].startswith(("decode", "rows bf16")):
            # Were the slots loaded in the iteration that uses them, half of the buffers would wait for them.
            assert found["shared_bytes"] >= 2 * DEFAULT.tile_bytes * (DEFAULT.num_stages - 1), found["name"]
            assert found["ptx"]["async_copies"] > 0
    # Two programs find room in a multiprocessor.
    assert DEFAULT.programs_per_sm * compiled[0]["shared_bytes"] <= HOPPER_SHARED_BYTES


def test_packed_pages_are_copied_while_others_are_unpacked(compiled):
    """Elements and scales: no load waits for memory in the iteration that uses it."""
    packed = [found for found in compiled if found["name"].startswith("packed")]
    assert len(packed) == 5
    for found in packed:
        kv = found["name"].split()[1]
        packing = PagePacking(FORMATS[kv], 64, 128)
        tuning, tile_tokens = PACKED_DEFAULTS[kv], packed_tile_size(packing)
        elements = 2 * packing.element_bytes * tile_tokens // 64
        numbers = 2 * packing.key_numbers // packing.key_groups
        numbers += 2 * packing.value_numbers * tile_tokens // 64
        assert found["shared_bytes"] >= (tuning.num_stages - 1) * (elements + numbers), found["name"]
        # Numbers are repeated in registers, and nothing that is worked out passes through shared memory. Triton 3.8
        # takes what was unpacked through it, at most a tile's keys or values at a time (docs/versions.md).
        through = 2 * 128 * tile_tokens if TRITON >= (3, 8) else 0
        assert found["shared_bytes"] <= (tuning.num_stages - 1) * (elements + 3 * numbers) + through, found["name"]
        assert found["ptx"]["async_copies"] > 0
        assert tuning.programs_per_sm * found["shared_bytes"] <= HOPPER_SHARED_BYTES


def test_the_indexer_multiplies_on_the_warpgroup_tensor_core(compiled):
    names = ("indexer", "native scores bf16")
    assert all(found["ptx"]["wgmma"] > 0 for found in compiled if found["name"].startswith(names))


def test_no_maximum_loses_what_is_no_number_before_the_native_top_k(compiled):
    """``max.f32`` gives the number where one of the two is NaN, unlike ``max.NaN.f32``; interpreted they are one."""
    native = [found for found in compiled if found["name"].startswith("native scores")]
    assert native
    assert all(found["ptx"]["maxima"] == 0 for found in native)


def test_the_indexer_asks_for_its_first_keys_where_it_is_told_to(compiled):
    indexers = {found["name"]: found["ptx"]["prefetches"] > 0 for found in compiled if found["name"][:7] == "indexer"}
    assert indexers == {name: name.endswith(" early") for name in indexers}
    assert True in indexers.values()


def test_dependent_launches_wait_once_and_nothing_else_does(compiled):
    waits = {found["name"]: found["ptx"]["dependent_waits"] for found in compiled}
    # In the merge one wait stands for both stores; a kernel launched in the plain way needs none.
    heads = ("decode", "packed", "rows bf16")
    splits = [name for name in waits if name.startswith(heads) and "'DEPENDENT'" not in name]
    waiting = [*splits, "merge of 64", "merge of 256", "rows merge", "indexer fp8_query=True early"]
    assert len(waiting) == 13
    assert waits == {name: int(name in waiting) for name in waits}
