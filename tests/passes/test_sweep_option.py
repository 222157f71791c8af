"""``--sweep``: one method becomes several, and what it refuses."""

import pytest

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig, load_config, sweep_methods
from kvscope.harness.passes.options import build_config
from kvscope.methods.registry import create_method


def labels(config: RunConfig) -> list[str]:
    return [create_method(spec).label for spec in config.methods]


def test_every_value_becomes_a_method_and_the_others_stay() -> None:
    config = load_config(flags={"methods": ["dense", "lsa:tau=16", "recency"]}, sweeps=["lsa.threshold=0.3,0.5,0.7"])
    assert labels(config) == ["dense", "lsa:tau=16,threshold=0.3", "lsa:tau=16", "lsa:tau=16,threshold=0.7", "recency"]


def test_sweeps_combine_and_win_over_the_spec() -> None:
    config = load_config(flags={"methods": ["lsa:tau=8"]}, sweeps=["lsa.threshold=0.3,0.7", "lsa.tau=16,256"])
    assert labels(config) == [f"lsa:tau={tau},threshold={threshold}" for threshold in (0.3, 0.7) for tau in (16, 256)]


def test_sweeps_of_several_methods_run_side_by_side() -> None:
    names = ["quest", "moba", "msa", "dsa:indexer=oracle"]
    sweeps = [f"{name.partition(':')[0]}.budget_tokens=256,512,1k,2k,4k" for name in names]
    found = labels(load_config(flags={"methods": ["dense", *names]}, sweeps=sweeps))
    assert len(found) == 21
    for name in names:
        separator = "," if ":" in name else ":"
        own = [label for label in found if label.startswith(name.partition(":")[0])]
        bare, _, option = name.partition(":")
        assert own == [
            f"{bare}:budget_tokens={budget}{',' + option if separator == ',' else ''}"
            for budget in (256, 512, 1024, 2048, 4096)
        ]


def test_units_are_read_as_in_a_spec() -> None:
    (first, second) = sweep_methods(["recency"], ["recency.recency_tokens=256,4k"])
    assert [create_method(spec).config.recency_tokens for spec in (first, second)] == [256, 4096]


def test_the_command_line_reaches_it() -> None:
    config = build_config({"methods": ["lsa"], "sweeps": ["lsa.tau=16,64"], "config": None, "sets": None})
    assert labels(config) == ["lsa:tau=16", "lsa:tau=64"], "without a value tau is the indexer's"


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("threshold=0.3", "is not method.option=value,value"),
        ("lsa.threshold=", "is not method.option=value,value"),
        ("lsa.threshold=0.3,,0.5", "is not method.option=value,value"),
        ("random.fraction=0.1,0.2", "names method 'random', which is not among the methods (dense, lsa)"),
        ("lsa.tau=16,16", "given twice"),
    ],
)
def test_bad_sweeps_get_one_clear_sentence(sweep: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(flags={"methods": ["dense", "lsa"]}, sweeps=[sweep])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        ("lsa.treshold=0.3", "no option 'treshold'. Did you mean 'threshold'?"),
        ("lsa.threshold=0.3,1.5", "threshold must lie between 0 and 1, both excluded, got 1.5"),
    ],
)
def test_a_bad_option_is_refused_when_the_method_is_made(sweep: str, message: str) -> None:
    config = load_config(flags={"methods": ["lsa"]}, sweeps=[sweep])
    with pytest.raises(UsageError, match="lsa") as caught:
        labels(config)
    assert message in str(caught.value)


def test_one_option_is_swept_once() -> None:
    with pytest.raises(UsageError, match=r"dense\.kv is given twice: write all values in one"):
        load_config(flags={"methods": ["dense"]}, sweeps=["dense.kv=int8", "dense.kv=int4"])
