"""The recipe at equal bytes: what each step asks for; and what packed decode's two scripts make of their inputs."""

import json
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from benchmark_scripts import load_script

from kvscope.methods.kernels.paged_decode.kernel import PACKED_DEFAULTS, packed_tile_size
from kvscope.methods.kv_format import FORMATS


def test_every_step_is_a_run_that_would_be_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_script(monkeypatch, "equal_bytes")
    values = benchmark.read_config({"samples": 54, "device": None})
    configs = {step: benchmark.checked(benchmark.step_values(step, values)) for step in benchmark.STEPS}
    labels = {step: [spec.label for spec in config.methods] for step, config in configs.items()}
    assert configs["question"].method_from == "question"
    assert set(labels["question"]) < set(labels["accuracy"])
    assert "dense" in labels["question"]
    assert not any("quest" in label for label in labels["question"])
    # One prompt a length is answered beside the footprint cells, which are measured alone.
    assert (configs["times"].samples, configs["times"].jobs, configs["times"].footprint) == (1, 1, True)
    assert set(labels["times"]) < set(labels["accuracy"])
    assert {"dense", "lsa", "snapkv:share=0.135"} <= set(labels["times"])
    assert len(list(benchmark.plan_lines(values))) == len(benchmark.STEPS)
    # A cell has 200 prompts or more, and every method is in a share or has none.
    assert len(configs["accuracy"].tasks) * configs["accuracy"].samples >= 200
    shares = {benchmark.without_share(label)[2] for label in labels["accuracy"]}
    assert shares == {None, 0.05, 0.135, 0.25}


def test_nothing_is_done_before_it_has_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    benchmark = load_script(monkeypatch, "equal_bytes")
    values = benchmark.read_config({})
    assert not any(benchmark.is_done(step, values, tmp_path) for step in benchmark.STEPS)
    assert benchmark.run_all(["accuracy"], values, tmp_path, limit_s=1.0) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kv", FORMATS)
def test_variants_begin_with_the_defaults_and_differ(monkeypatch: pytest.MonkeyPatch, kv: str) -> None:
    benchmark = load_script(monkeypatch, "packed_variants")
    found, default = benchmark.tunings(kv), PACKED_DEFAULTS[kv]
    sizes = {"programs_per_sm": default.programs_per_sm, "piece_words": default.piece_words}
    assert replace(found[0], **sizes) == default
    packing = benchmark.PagePacking(FORMATS[kv], benchmark.PAGE_TOKENS, benchmark.HEAD_DIM)
    assert all(packed_tile_size(packing, each) == each.tile_tokens for each in found)
    assert len(set(found)) == len(found)
    fits = {None: 8, 168: 12, 128: 12, 96: 12}
    checks = [{"kv": kv, **vars(each), "error": 1e-4, "programs_that_fit": fits[each.max_registers]} for each in found]
    wrong = next(each for each in found[1:] if each.max_registers is None)
    without_room = next(each for each in found if each.max_registers == 96)
    checks[found.index(wrong)] |= {"error": 1.0}
    checks[found.index(without_room)] = {"kv": kv, **vars(without_room), "no_room": "none"}
    timed = benchmark.variants(kv, checks)
    # What is wrong or finds no room is not timed, nor fewer registers for as many programs.
    worth = [each for each in found if each.max_registers in (None, 168) and each not in (wrong, without_room)]
    first, rest = timed[: len(worth)], timed[len(worth) :]
    assert [(replace(each, programs_per_sm=8), each.programs_per_sm) for each in first] == [
        (each, fits[each.max_registers]) for each in worth
    ]
    assert {each.programs_per_sm for each in rest if each.max_registers == 168} == {11, 10, 9, 8}


def test_a_variant_that_ends_its_process_is_wrong_and_the_next_ones_are_checked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    benchmark = load_script(monkeypatch, "packed_variants")

    def run(command: list[str], **options: object) -> CompletedProcess[str]:
        share = command[command.index("--check") + 1 :]
        done = share[: share.index("int4:1")] if "int4:1" in share else share
        out = "".join(json.dumps({"kv": each, "error": 0.0}) + "\n" for each in done)
        return CompletedProcess(command, int(done != share), out, "what came before\nan illegal access\n")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    rows = benchmark.checked_apart(["int4:0", "int4:1", "int4:2"])
    assert [row["kv"] for row in rows] == ["int4:0", "int4:1", "int4:2"]
    assert [row["error"] > benchmark.MOST_ERROR for row in rows] == [False, True, False]
    assert rows[1]["failed"] == ["an illegal access"]


@pytest.mark.parametrize(
    ("registers", "shared_bytes", "num_warps", "fit"),
    [(255, 9984, 1, 8), (168, 9984, 1, 12), (169, 9984, 1, 8), (128, 19968, 1, 11), (128, 9984, 2, 8), (32, 0, 1, 32)],
)
def test_programs_fit_by_registers_of_a_quarter_and_by_shared_memory(
    monkeypatch: pytest.MonkeyPatch, registers: int, shared_bytes: int, num_warps: int, fit: int
) -> None:
    benchmark = load_script(monkeypatch, "packed_space")
    assert benchmark.programs_that_fit(registers=registers, shared_bytes=shared_bytes, num_warps=num_warps) == fit


def test_counts_of_other_versions_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    benchmark = load_script(monkeypatch, "packed_instructions")
    file = tmp_path / "counts.json"
    rows = [{"triton": benchmark.triton.__version__, "kernel": each} for each in ("fp8", "int4")]
    file.write_text(json.dumps({"rows": [{"triton": "0", "kernel": "fp8"}, rows[0]], "rows_before": [{"kernel": "a"}]}))
    benchmark.write(file, rows)
    benchmark.write(file, rows[1:])
    held = json.loads(file.read_text())
    assert held["rows"] == [{"triton": "0", "kernel": "fp8"}, rows[1]]
    assert held["rows_before"] == [{"kernel": "a"}]


def test_the_loop_over_tiles_is_the_innermost_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load_script(monkeypatch, "packed_instructions")
    body = "\n".join(f"        /*{i:04x}*/  FMUL R1, R1, R{i} ;" for i in range(200))
    text = f""".L_x_1:
        /*0000*/  MOV R1, R2 ;
.L_x_2:
{body}
        /*1000*/  @P0 BRA `(.L_x_2) ;
        /*1010*/  @P1 BRA `(.L_x_1) ;
        /*1020*/  EXIT ;
"""
    assert len(benchmark.tile_loop(text)) == 201
