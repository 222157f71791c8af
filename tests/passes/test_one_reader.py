"""A value means the same wherever it is given: option, sweep, mapping, YAML file, flag, --set, Python."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig, load_config, make_config, sweep_methods
from kvscope.harness.passes.job import FootprintJob
from kvscope.methods.registry import create_method
from kvscope.specs import Spec, parse_spec

REFUSED = "refused"


def value_of(read: Any) -> object:
    try:
        return read()
    except UsageError as error:
        text = str(error)
        assert "\n" not in text
        assert len(text) < 600
        return REFUSED


def readings(method: str, option: str, text: str, folder: Path) -> dict[str, object]:
    """Return the value of a method's option by every way it can be given."""

    def made(spec: Any) -> object:
        return getattr(create_method(spec).config, option)

    def in_file(scalar: str) -> object:
        file = folder / "run.yaml"
        file.write_text(f"methods:\n- name: {method}\n  {option}: {scalar}\n")
        return made(load_config(file).methods[0])

    def through_the_worker() -> object:
        job = FootprintJob.model_construct(method=parse_spec({"name": method, option: text}, kind="method"))
        given = json.loads(job.model_dump_json(include={"method"}))["method"]
        return made(given)

    spec = f'{method}:{option}="{text}"'
    return {
        "spec": value_of(lambda: made(spec)),
        "mapping": value_of(lambda: made({"name": method, option: text})),
        "sweep": value_of(lambda: made(sweep_methods([method], [f'{method}.{option}="{text}"'])[0])),
        "file": value_of(lambda: in_file(text)),
        "quoted in a file": value_of(lambda: in_file(json.dumps(text))),
        "set": value_of(lambda: made(load_config(sets=[f"methods=[{{name: {method}, {option}: {text}}}]"]).methods[0])),
        "set as text": value_of(lambda: made(load_config(sets=[f"methods={json.dumps(spec)}"]).methods[0])),
        "worker": value_of(through_the_worker),
    }


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("random.seed", "010", 10), ("random.seed", "08", 8), ("random.seed", "0x10", REFUSED),
        ("random.seed", "0o10", REFUSED), ("random.seed", "1_000", 1000), ("random.seed", "1e3", REFUSED),
        ("random.seed", "+5", 5), ("random.seed", "-5", -5), ("random.seed", " 5 ", 5), ("random.seed", "5.0", 5),
        ("random.seed", "5.5", REFUSED), ("random.seed", "\uff15", REFUSED), ("random.seed", "1:30", REFUSED),
        ("random.seed", "2001-13-45", REFUSED), ("random.seed", "2001-01-01", REFUSED), ("random.seed", "on", REFUSED),
        ("random.seed", "none", REFUSED), ("random.seed", "5k", REFUSED), ("random.seed", "9" * 400, REFUSED),
        ("random.seed", str(2**63 - 1), 2**63 - 1), ("random.seed", str(2**63), REFUSED),
        ("random.fraction", ".5", 0.5), ("random.fraction", "1e-1", 0.1), ("random.fraction", "0.10", 0.1),
        ("random.fraction", "nan", REFUSED), ("random.fraction", ".nan", REFUSED), ("random.fraction", "inf", REFUSED),
        ("random.fraction", "1e400", REFUSED), ("random.fraction", "true", REFUSED),
        ("recency.recency_tokens", "0.5k", 512), ("recency.recency_tokens", "4K", 4096),
        ("recency.recency_tokens", "0.25M", 262144), ("recency.recency_tokens", "0.3k", REFUSED),
        ("recency.recency_tokens", "auto", None), ("recency.recency_tokens", "None", None),
        ("recency.recency_tokens", "null", None), ("recency.recency_tokens", "~", None),
        ("recency.recency_tokens", "4KiB", REFUSED),
        ("recency.budget_bytes", "1.5GiB", 3 * 2**29), ("recency.budget_bytes", "24GB", 24 * 10**9),
        ("recency.budget_bytes", "1 kib", 1024), ("recency.budget_bytes", "4k", REFUSED),
        ("recency.budget_bytes", "1.5", REFUSED),
        ("sliding_window.sinks", "0.5k", 512),
        ("lsa.indexer", "on", "on"), ("lsa.indexer", "yes", "yes"), ("lsa.indexer", "007", "007"),
        ("lsa.indexer", "2001-01-01", "2001-01-01"), ("lsa.indexer", "true", "true"), ("lsa.indexer", "auto", None),
    ],
)  # fmt: skip
def test_an_option_reads_the_same_everywhere(
    option: str, text: str, value: object, tmp_path: Path, monkeypatch: Any
) -> None:
    method, _, key = option.partition(".")
    if key == "indexer":  # a folder of that name would be looked for
        monkeypatch.setattr("kvscope.methods.registry.method_class", lambda name: _Named)
    found = readings(method, key, text, tmp_path)
    assert found == dict.fromkeys(found, value)


class _Named:
    """Stands for lsa where only its options matter."""

    from kvscope.methods.lsa.options import LsaConfig as Config

    name = "lsa"

    def __init__(self, config: Any, *, label: str) -> None:
        self.config, self.label = config, label


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "010", 10), ("seed", "0x10", REFUSED), ("seed", "1_000", 1000), ("seed", "1e3", REFUSED),
        ("seed", " 5 ", 5), ("seed", "+5", 5), ("seed", "5.0", 5), ("seed", "-1", REFUSED), ("seed", "\uff15", REFUSED),
        ("seed", "2001-13-45", REFUSED), ("seed", str(2**63), REFUSED), ("samples", "1" + "0" * 23, REFUSED),
        ("lengths_tokens", "0.5k", (512,)), ("lengths_tokens", "010", (10,)), ("lengths_tokens", "0", REFUSED),
        ("page_tokens", "0.0625k", 64), ("max_new_tokens", "none", None), ("max_new_tokens", "0", REFUSED),
        ("gpu_budget_bytes", "1.5GiB", 3 * 2**29), ("gpu_budget_bytes", "1.5gib", 3 * 2**29),
        ("gpu_budget_bytes", "9" * 400, REFUSED), ("gpu_budget_bytes", "0", REFUSED),
        ("gpu_budget_bytes", "4k", REFUSED), ("gpu_budget_bytes", "1.5", REFUSED),
        ("gpu_budget_bytes", "1.5b", REFUSED),
        ("time_limit_s", "1e3", 1000.0), ("time_limit_s", "inf", REFUSED), ("time_limit_s", "nan", REFUSED),
        ("footprint", "yes", True), ("footprint", "OFF", False), ("footprint", "1", REFUSED),
        ("answer_nll", "on", True), ("decode_graph", "on", "on"), ("decode_graph", "false", "off"),
        ("model", "010", "010"), ("model", "on", "on"), ("out", "none", "none"), ("device", "cuda:01", "cuda:01"),
    ],
)  # fmt: skip
def test_a_key_reads_the_same_everywhere(key: str, text: str, value: object, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"{key}: {text}\n")
    quoted = tmp_path / "quoted.yaml"
    quoted.write_text(f"{key}: {json.dumps(text)}\n")
    found = {
        "python": value_of(lambda: getattr(make_config({key: text}), key)),
        "flag": value_of(lambda: getattr(load_config(flags={key: text}), key)),
        "set": value_of(lambda: getattr(load_config(sets=[f"{key}={text}"]), key)),
        "file": value_of(lambda: getattr(load_config(file), key)),
        "quoted in a file": value_of(lambda: getattr(load_config(quoted), key)),
    }
    assert found == dict.fromkeys(found, value)


@pytest.mark.parametrize(("given", "value"), [
    (10, 10), (10.0, 10), ("10", 10), (True, REFUSED), (10.5, REFUSED),
    (np.int32(10), 10), (np.float32(10), 10), (np.float32(10.5), REFUSED),
])  # fmt: skip
def test_python_numbers_are_the_text_of_them(given: object, value: object) -> None:
    assert value_of(lambda: make_config({"seed": given}).seed) == value
    found = value_of(lambda: create_method({"name": "random", "seed": given}).config.seed)
    assert found == value
    assert found is REFUSED or type(found) is int


def test_paths_are_their_text(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"prompt": "red", "answers": "blue"}')
    config = make_config(
        {"model": tmp_path, "out": tmp_path, "tasks": [{"name": "jsonl", "data": tmp_path / "q.jsonl"}]}
    )
    assert (config.model, config.out) == (str(tmp_path), str(tmp_path))
    assert str(config.tasks[0]) == f"jsonl:data={tmp_path / 'q.jsonl'}"
    assert make_config({"lengths_tokens": range(512, 1025, 512)}).lengths_tokens == (512, 1024)


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        ("niah_single_1:data=5", "niah_single_1 takes no data file"),
        ("niah_single_2:data=5", "Cannot read the essay file '5'"),
        ({"name": "niah_single_2", "data": 5}, "option 'data' expects text, got 5"),
        ("niah_single_1:dta=5", "Task niah_single_1 has no option 'dta'. Did you mean 'data'?"),
    ],
)
def test_options_of_tasks_are_read_as_those_of_methods(spec: Any, sentence: str) -> None:
    from kvscope.tasks.registry import create_task

    with pytest.raises(UsageError) as caught:
        create_task(spec)
    assert sentence in str(caught.value)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("samples: " + "[" * 1000 + "]" * 1000, "nested too deeply"),
        ("samples: " + "[" * 30 + "]" * 30, "nested too deeply"),
        (BOMB + "samples: *h\n", "Unknown key 'a'"),
        ("samples: &a [*a]\n", "a value holds itself"),
        ("samples: !!python/object/apply:os.system [x]\n", "the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        ("samples: !mine 5\n", "the tag '!mine' has no meaning here"),
        ("samples: !!binary aGk=\n", "has no meaning here"),
        ("? [a, b]\n: 5\n", "a key is not one word"),
        ("seed: 1\n---\nseed: 2\n", "is not valid YAML"),
        ("seed: 2001-13-45\n", "seed in"),
        ("seed: " + "9" * 5000 + "\n", "seed in"),
        ("seed: \x00\n", "is not valid YAML"),
        ("methods: [{name: random, seed: [1, 2]}]\n", "expected one value"),
        ("methods: [{name: [random]}]\n", "needs a 'name'"),
        ("methods: {name: random, seed: 1}\nmethods: dense\n", "key 'methods' is given twice"),
        ("x" * 1_000_001, "more than 1,000,000 characters"),
    ],
)
def test_bad_yaml_is_one_short_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_config(file)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 800
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "item", ["samples=" + "[" * 1000, "seed=2001-13-45", "samples=[" + "1," * 10**4 + "1]", "seed=\x1b[2J"]
)
def test_a_bad_set_is_one_short_sentence(item: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(sets=[item])
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_anchors_and_merges_of_a_file_still_work(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "methods:\n- &base {name: random, seed: 1, fraction: 0.5}\n- {<<: *base, seed: 2}\ntasks: [niah_single_1]\n"
    )
    assert load_config(file).methods[1] == Spec("random", (("seed", "2"), ("fraction", "0.5")))


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), TEXT, max_size=3))
def test_the_text_form_reads_back(options: dict[str, str]) -> None:
    options.pop("name", None)
    for name in ("random", "package.module:Class", "jsonl"):
        spec = Spec(name, tuple(options.items()))
        assert parse_spec(str(spec), kind="method") == spec
        assert parse_spec({"name": name, **options}, kind="method") == spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("jsonl:a b.jsonl", Spec("jsonl", (("data", "a b.jsonl"),))),
        ("jsonl:data=x=y.jsonl,metric=f1", Spec("jsonl", (("data", "x=y.jsonl"), ("metric", "f1")))),
        ('jsonl:"a,b=c.jsonl",metric=f1', Spec("jsonl", (("data", "a,b=c.jsonl"), ("metric", "f1")))),
        ("jsonl:Questions", Spec("jsonl", (("data", "Questions"),))),
        ("a.b:C", Spec("a.b:C")),
        ("a.b:C:d=e:f", Spec("a.b:C", (("d", "e:f"),))),
        ("a:C:d=1", Spec("a:C", (("d", "1"),))),
        ("random: seed = 1 , fraction='0.5'", Spec("random", (("seed", "1"), ("fraction", "0.5")))),
    ],
)
def test_the_grammar(text: str, spec: Spec) -> None:
    assert parse_spec(text, kind="method") == spec


def test_a_configuration_reads_back_from_what_run_json_keeps() -> None:
    config = make_config({"methods": [{"name": "lsa", "indexer": "a,b", "tau": 4}, "a.b:C:d=1"], "tasks": ["jsonl:q"]})
    kept = json.loads(config.model_dump_json())
    assert kept["methods"] == ['lsa:indexer="a,b",tau=4', "a.b:C:d=1"]
    again = make_config(kept)
    assert isinstance(again, RunConfig)
    assert again.identity() == config.identity()
