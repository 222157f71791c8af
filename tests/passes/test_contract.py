"""Tasks and methods of a stranger that do not keep their contract: one sentence before the first row."""

import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sequences import prefilled
from sessions import Single
from tiny import MakeConfig
from tiny_models import loaded_model, prompt_ids

from kvscope import plugins
from kvscope.errors import UsageError
from kvscope.harness.passes.contract import build_sample, check_methods, score_of
from kvscope.harness.passes.plan import make_plan
from kvscope.methods.base import ModelShape
from kvscope.methods.resident import StaticResidency
from kvscope.tasks.base import Sample, Task

SHAPE = ModelShape(
    layers=(0, 1), n_layers=2, n_q_heads=2, n_kv_heads=1, head_dim=16, hidden_size=32, element_bytes=2, page_tokens=16
)
GOOD = Sample(
    task="last", question_type="word", length_tokens=24, sample=0, seed=0, ids=tuple(range(16)), text="x",
    question_start=15, evidence_spans=(), depth=0.5, prompt_sha256="0", targets=("x",), max_new_tokens=8,
)  # fmt: skip


class Last(Task):
    name = "last"
    question_types = ("word",)
    max_new_tokens = 8
    made: Any = GOOD
    given: Any = 0.5

    def min_length_tokens(self, tokenizer: Any) -> int:
        return 24

    def build(self, tokenizer: Any, *, length_tokens: int, sample: int, seed: int) -> Sample:
        if isinstance(self.made, Exception):
            raise self.made
        made: Sample = self.made
        return made

    def score(self, sample: Sample, output: str) -> float:
        given: float = self.given
        return given


def built(made: object) -> Sample:
    task = Last()
    task.made = made
    return build_sample(task, None, length_tokens=24, sample=0, seed=0)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (RuntimeError("no\nwords"), r"its build raised RuntimeError: no words \(test_contract.py, line \d+\)\."),
        (None, "is None, expected a Sample"),
        (replace(GOOD, ids=tuple(range(15))), "has 15 tokens, expected 16, which leave 8 for the answer"),
        (replace(GOOD, ids=tuple(range(17))), "has 17 tokens, expected 16"),
        (replace(GOOD, question_start=16), "has its question at token 16 of 16"),
        (replace(GOOD, question_type="other"), "has the question type 'other'"),
        (replace(GOOD, depth=7.0), "has the depth 7.0"),
    ],
)
def test_a_prompt_that_is_none_is_refused(made: object, words: str) -> None:
    with pytest.raises(UsageError, match=f"Task 'last' cannot be used: .*{words}"):
        built(made)
    assert built(GOOD) is GOOD


def test_what_a_task_says_in_an_error_of_ours_stays() -> None:
    with pytest.raises(UsageError, match=r"^use a larger --length$"):
        built(UsageError("use a larger --length"))


@pytest.mark.parametrize("given", [17, -1, float("nan"), None, "0.5"])
def test_a_score_that_is_none_is_said(given: object) -> None:
    task = Last()
    task.given = given
    with pytest.raises(ValueError, match=r"the score of task 'last' is .*, expected a number from 0 to 1"):
        score_of(task, GOOD, "x")


@dataclass(frozen=True, kw_only=True)
class FirstConfig:
    """Options.

    Attributes:
        n_said: tokens that stay.
    """

    n_said: int = 40


class First(StaticResidency[FirstConfig]):
    name = "first"
    stays = saves = source = cost = "x"
    saving_kind = "freed"
    Config = FirstConfig
    ranges: Any = ((0, 40),)

    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        return self.config.n_said

    def resident_ranges(self, prompt: Any) -> Any:
        return self.ranges

    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {"n_said": self.config.n_said}


class RaisingPredict(First):
    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        raise KeyError("nope")


class HalfTokens(First):
    def n_resident_tokens(self, n_tokens: int, shape: ModelShape | None) -> int:
        return n_tokens / 4  # type: ignore[return-value]


class NotFinite(First):
    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> dict[str, Any]:
        return {"share": float("nan")}


class Silent(First):
    def effective_config(self, n_tokens: int, shape: ModelShape | None = None) -> Any:
        return None


class OtherArguments(First):
    def effective_config(self, n_tokens: int) -> dict[str, Any]:  # type: ignore[override]
        return {}


class NoTruth(First):
    def is_noop(self, n_tokens: int, shape: ModelShape | None = None) -> Any:
        return None


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (RaisingPredict, r"its predict raised KeyError: 'nope' \(test_contract.py, line \d+\)\."),
        (HalfTokens, "its predict of a prompt of 510 tokens is Footprint.*, expected a Footprint of whole numbers"),
        (NotFinite, "its effective_config of a prompt of 510 tokens is .*nan"),
        (Silent, "its effective_config of a prompt of 510 tokens is None"),
        (OtherArguments, "its effective_config raised TypeError: .*positional arguments but 3 were given"),
        (NoTruth, "its is_noop of a prompt of 510 tokens is None"),
    ],
)
def test_a_method_is_asked_before_the_first_row(cls: type[First], words: str) -> None:
    with pytest.raises(UsageError, match=f"Method 'first' cannot be used: {words}"):
        check_methods([cls()], SHAPE, "cpu", lengths_tokens=[510])
    check_methods([First()], SHAPE, "cpu", lengths_tokens=[0, 510])


def test_the_plan_asks_methods_and_tasks(
    small: MakeConfig, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setitem(sys.modules, "strangers", request.module)
    with pytest.raises(UsageError, match="Method 'first' cannot be used: its predict raised KeyError"):
        make_plan(small(methods=["strangers:RaisingPredict"]))
    with pytest.raises(UsageError, match="Task 'last' cannot be used: sample 0 at length 512 has 16 tokens"):
        make_plan(small(tasks=["strangers:Last"]))


@pytest.mark.parametrize(
    ("ranges", "n_said", "words"),
    [
        ([(0, 20), (10, 30)], 40, r"ascending and disjoint in the prompt, got \(10, 30\) behind token 20"),
        ([(20, 40), (0, 20)], 40, "ascending and disjoint"),
        ([(60, 80)], 20, "ascending and disjoint"),
        ([(-40, 0)], 40, "ascending and disjoint"),
        ([(0, 50)], 40, "resident_ranges keeps 50 tokens, and n_resident_tokens says 40"),
    ],
)
def test_resident_ranges_are_held_against_what_is_predicted(ranges: Any, n_said: int, words: str) -> None:
    loaded, method = loaded_model("llama"), First(FirstConfig(n_said=n_said))
    method.ranges = ranges
    with pytest.raises(ValueError, match=words), Single(loaded, method, prompt_of_64(), reserve_tokens=1):
        pass


def prompt_of_64() -> Any:
    return prefilled(loaded_model("llama"), prompt_ids(64), [])


def test_making_one_may_raise_anything(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvscope.harness.info.catalog import show_text
    from kvscope.methods.registry import create_method
    from kvscope.tasks.registry import create_task, task_class

    (tmp_path / "strange_making.py").write_text(
        "from dataclasses import dataclass\n"
        "from test_contract import First, Last\n\n"
        "class Raising(Last):\n    def __init__(self):\n        raise RuntimeError('not today')\n\n"
        "class Asking(Last):\n    def __init__(self, word):\n        pass\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Odd:\n    path: 'Nowhere' = None\n\n"
        "class OddOption(First):\n    Config = Odd\n\n"
        "class OddWord(Last):\n    def __init__(self, *, word: 'Nowhere' = None):\n        pass\n\n"
        "class Mute(First):\n    def effective_config(self, n_tokens, shape=None):\n        raise KeyError('mute')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "test_contract", sys.modules[__name__])
    plugins.installed.cache_clear()
    for make, spec, words in (
        (create_task, "strange_making:Raising", "not today .strange_making.py, line 6."),
        (create_task, "strange_making:Asking", "missing 1 required positional argument: 'word'"),
        (
            create_method,
            "strange_making:OddOption",
            "reading the types of its options raised NameError: name 'Nowhere' is not defined.",
        ),
        (task_class, "strange_making:OddWord", "reading the types of its options raised NameError"),
        (show_text, "strange_making:Mute", r"its effective_config raised KeyError: 'mute' .strange_making.py, line"),
    ):
        with pytest.raises(UsageError, match=words):
            make(spec)
