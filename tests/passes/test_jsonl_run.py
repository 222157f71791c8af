"""A run over prompts of one's own: what the plan refuses, what the rows say, and a file that changed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import MakeConfig

import kvscope
from kvscope.errors import UsageError
from kvscope.harness.passes.footprint import FootprintPass
from kvscope.harness.passes.plan import make_plan


def write(path: Path, n_lines: int, **more: Any) -> Path:
    lines = [
        {"context": f"Line {k} says blue.", "question": "Which colour? It is", "answers": "blue"}
        for k in range(n_lines)
    ]
    path.write_text("".join(json.dumps({**line, **more}) + "\n" for line in lines), encoding="utf-8")
    return path


def test_two_files_are_two_tasks_of_one_run(small: MakeConfig, tmp_path: Path) -> None:
    first, second = write(tmp_path / "first.jsonl", 2), write(tmp_path / "second.jsonl", 3, metric="f1")
    config = small(tasks=[f"jsonl:{first}", {"name": "jsonl", "data": str(second)}], methods=["dense"])
    run = kvscope.run(config, progress=False)
    assert list(zip(run.samples["task"], run.samples["question_type"], strict=True)) == [
        *[("jsonl:first", "string_match_all")] * 2,
        *[("jsonl:second", "f1")] * 2,
    ]
    assert set(run.samples["status"]) == {"ok"}
    assert all(re.search(r",sha256=[0-9a-f]{64}$", task) for task in run.info.identity["tasks"])
    kvscope.run(config, progress=False)
    write(second, 3, metric="exact_match")
    with pytest.raises(UsageError, match=r"holds another configuration; it differs in: tasks \(there: .*second"):
        kvscope.run(config, progress=False)


def test_footprint_prompts_have_the_length_asked_for(small: MakeConfig, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", 2)
    plan = make_plan(small(tasks=[f"jsonl:{path}"], methods=["dense"], footprint=True, footprint_decode_tokens=4))
    job = FootprintPass().job(plan, plan.methods[0], 512)
    assert len(job.context_ids) + len(job.forced_ids) == 512 - 4


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"samples": 3}, "Task 'jsonl:q' has 2 prompts, and 3 samples are asked for: use --samples 2 or fewer"),
        ({"lengths_tokens": [10]}, "Length 10 is too short for task 'jsonl:q'"),
        ({"tasks": ["jsonl:{q}", "jsonl:{q},metric=f1"]}, "Two tasks are called 'jsonl:q'"),
        ({"tasks": ["jsonl:{q}", "jsonl:{q}"]}, "is given twice: keep one"),
        ({"tasks": ["jsonl:{q}.gone"]}, "There is no file"),
    ],
)
def test_the_plan_says_what_does_not_fit(small: MakeConfig, tmp_path: Path, values: dict[str, Any], fault: str) -> None:
    path = write(tmp_path / "q.jsonl", 2)
    tasks = [each.format(q=path) for each in values.get("tasks", ["jsonl:{q}"])]
    with pytest.raises(UsageError, match=re.escape(fault)):
        make_plan(small(**{**values, "tasks": tasks}))


@pytest.mark.parametrize(("method_from", "prompt", "n_tokens"), [("last_token", 3, 10), ("question", 2, 7)])
def test_a_budget_too_small_for_a_short_prompt_is_refused_first(
    small: MakeConfig, tmp_path: Path, method_from: str, prompt: int, n_tokens: int
) -> None:
    lines = [
        {"prompt": "red " * 200, "answers": "blue"},
        {"context": "red " * 5, "question": "red " * 50, "answers": "blue"},
        {"prompt": "red " * 9 + "red", "answers": "blue"},
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = small(tasks=[f"jsonl:{path}"], samples=3, methods=["h2o:budget_fraction=0.15"], method_from=method_from)
    told = f"Prompt {prompt} of task 'jsonl:q' at length 512: Method 'h2o': .* of {n_tokens} tokens"
    with pytest.raises(UsageError, match=told):
        kvscope.run(config, progress=False)
    assert not (tmp_path / "run").exists()


def test_methods_that_leave_nothing_out_of_short_prompts_are_told(small: MakeConfig, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", 2)
    methods = ["dense", "recency:recency_tokens=128", "recency:recency_tokens=4"]
    plan = make_plan(small(tasks=[f"jsonl:{path}"], methods=methods))
    (said,) = (note for note in plan.warnings if "leaves nothing out" in note)
    assert re.fullmatch(
        r"recency:recency_tokens=128 leaves nothing out of the prompts of jsonl:q, which have \d\d tokens at most: .*",
        said,
    )


def test_several_lengths_are_told_to_be_the_same_prompts(small: MakeConfig, tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", 2)
    plan = make_plan(small(tasks=[f"jsonl:{path}"], lengths_tokens=[512, 1024]))
    assert any("the same at every --length" in note for note in plan.warnings)
