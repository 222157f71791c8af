"""The launch constants of the indexer, as the benchmark tries them, in Triton's interpreter: the same logits."""

import pytest
import torch
from benchmark_scripts import load_script

pytest.importorskip("triton")


@pytest.fixture
def script(monkeypatch):
    found = load_script(monkeypatch, "indexer_cases")
    monkeypatch.setattr(found, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(found, "TOKENS", 2048)
    monkeypatch.setattr(found, "median_s", lambda calls, **_: len(calls) / 4)
    return found


def test_the_default_is_among_the_constants_and_each_is_tried_once(script):
    tried = list(script.tunings())
    assert script.DEFAULT in tried
    assert len(set(tried)) == len(tried) == len(script.PROGRAMS) * (2 * len(script.SHAPES) + 2)
    assert len({script.describe(tuning) for tuning in tried}) == len(tried)


def test_all_constants_give_the_defaults_logits(script):
    rows = list(script.sweep_rows())
    assert len(rows) == len(list(script.tunings()))
    assert max(row["difference"] for row in rows) < 1e-5
    assert {row["bytes"] for row in rows} == {3 * 512 * 132}


def test_a_difference_ends_the_sweep(script, monkeypatch):
    default = script.indexer_score

    def wrong(*given, tuning, out_LXn, **options):
        default(*given, tuning=tuning, out_LXn=out_LXn, **options)
        return out_LXn if tuning == script.DEFAULT else out_LXn.add_(1e3)

    monkeypatch.setattr(script, "indexer_score", wrong)
    with pytest.raises(ValueError, match="logits differ by"):
        list(script.sweep_rows())
