"""The recipe at equal bytes: what each step asks for; and what packed decode's two scripts make of their inputs."""

from pathlib import Path

import pytest
from benchmark_scripts import load_script

from kvscope.methods.kernels.paged_decode.kernel import PACKED_DEFAULTS
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
    assert (found[0].num_warps, found[0].num_stages) == (default.num_warps, default.num_stages)
    packing = benchmark.PagePacking(FORMATS[kv], benchmark.PAGE_TOKENS, benchmark.HEAD_DIM)
    kinds = [(benchmark.packed_tile_size(packing, each), each.num_warps, each.num_stages) for each in found]
    assert len(set(kinds)) == len(kinds)
    checks = [{"kv": kv, **vars(each), "error": 1.0 if each == found[1] else 1e-4} for each in found]
    right = benchmark._right(kv, checks)
    assert right == [found[0], *found[2:]]
    assert {tuning for _, tuning in benchmark.variants(kv, right)} >= {
        benchmark.dataclasses.replace(right[0], programs_per_sm=each) for each in benchmark.PROGRAMS[default.num_warps]
    }


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
