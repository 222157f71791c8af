"""Specs: what parses, what it means, and the sentence for everything that does not."""

import subprocess
import sys

import pytest

from kvscope.errors import UsageError
from kvscope.methods.registry import METHODS, create_method, method_names
from kvscope.specs import Spec, parse_spec


def test_names_are_listed_without_torch():
    code = (
        "import sys; from kvscope.methods.registry import method_names; from kvscope.specs import parse_spec;"
        "method_names(); parse_spec('recency:recency_tokens=5', kind='method'); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_every_name_resolves_to_a_class_of_that_name():
    for name in method_names():
        method = create_method(name)
        assert (method.name, method.label) == (name, name)


def test_text_mapping_and_spec_mean_the_same():
    text = create_method("random: fraction=0.25, chunk_tokens=32")
    mapping = create_method({"name": "random", "chunk_tokens": 32, "fraction": 0.25})
    spec = create_method(Spec("random", (("fraction", 0.25), ("chunk_tokens", "32"))))
    assert text.config == mapping.config == spec.config
    assert (
        text.label
        == mapping.label
        == create_method(parse_spec("random:chunk_tokens=32,fraction=.25", kind="method")).label
    )
    assert text.label == "random:fraction=0.25,chunk_tokens=32"


def test_equal_configs_have_equal_labels_and_others_differ():
    assert create_method("random:fraction=0.1").label == "random"
    labels = {create_method(spec).label for spec in ("random", "random:seed=1", "random:seed=2", "recency")}
    assert len(labels) == 4


@pytest.mark.parametrize(
    ("spec", "option", "value"),
    [
        ("recency:recency_tokens=2k", "recency_tokens", 2048),
        ("recency:recency_tokens=auto", "recency_tokens", None),
        ("recency:recency_tokens=none", "recency_tokens", None),
        ("recency:budget_bytes=64MiB", "budget_bytes", 64 * 2**20),
        ("recency:budget_fraction=.5", "budget_fraction", 0.5),
        ("sliding_window:window=1k,sinks=0", "window", 1024),
        ({"name": "recency", "budget_fraction": 1}, "budget_fraction", 1.0),
        ({"name": "recency", "recency_tokens": None}, "recency_tokens", None),
    ],
)
def test_values_have_types_and_units(spec, option, value):
    found = getattr(create_method(spec).config, option)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("recensy", "no method 'recensy'. Did you mean 'recency'?"),
        ("xyz", "no method 'xyz'. Known: adakv, dense, "),
        ("recency:recency_token=5", "no option 'recency_token'. Did you mean 'recency_tokens'?"),
        (
            "recency:recency_token=5",
            "recency_tokens, budget_bytes, budget_fraction, kv, share, read_share.",
        ),
        ("dense:window=5", "Its options are: kv."),
        ("recency:recency_tokens", "'recency_tokens' in method 'recency:recency_tokens' is not key=value"),
        ("recency:", "'recency:' is not a method: write name or name:key=value,key=value."),
        ("recency:recency_tokens=5,", "'' in method 'recency:recency_tokens=5,' is not key=value"),
        ("recency:=5", "'=5' in method 'recency:=5' is not key=value"),
        ("recency:recency_tokens=5,recency_tokens=6", "given twice"),
        ("recency:recency_tokens=many", "'recency_tokens' expects a whole number, got 'many'"),
        ("recency:recency_tokens=1.5", "expects a whole number"),
        ({"name": "recency", "recency_tokens": True}, "expects a whole number, got True"),
        ({"name": "random", "fraction": [1]}, "Option 'fraction' of method 'random' is [1], expected one value."),
        ("random:fraction=none", "'fraction' expects a number"),
        ("recency:recency_tokens=-1", "recency_tokens must be 0 or more, got -1"),
        ("random:fraction=1.5", "fraction must be between 0 and 1, got 1.5"),
        ("random:fraction=nan", "'fraction' expects a number, got 'nan'"),
        ("random:chunk_tokens=0", "chunk_tokens must be positive"),
        ("sliding_window:window=0", "window must be 1 or more"),
        ("sliding_window:sinks=-1", "sinks must be 0 or more"),
        ("recency:budget_fraction=0", "above 0 and at most 1"),
        ("recency:budget_bytes=0", "budget_bytes must be positive"),
        ("recency:budget_bytes=1,budget_fraction=0.5", "not both"),
        ("recency:budget_fraction=0.5,recency_tokens=5", "give one of them"),
        ("sliding_window:budget_fraction=0.5,window=5", "give one of them"),
        ({"recency_tokens": 5}, "needs a 'name'"),
        (5, "is text like"),
    ],
)
def test_bad_specs_get_one_clear_sentence(spec, text):
    with pytest.raises(UsageError) as caught:
        create_method(spec)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["sliding_window", "recency", "random"])
def test_paper_settings_fix_the_window(name):
    method = create_method(name, paper_settings=True)
    assert method.label == name
    values = method.effective_config(100_000)
    assert 8192 in (values.get("recency_tokens"), values.get("window"))
    option = "window" if name == "sliding_window" else "recency_tokens"
    chosen = create_method(f"{name}:{option}=77", paper_settings=True)
    assert chosen.effective_config(100_000)[option] == 77


def test_paper_settings_leave_budgets_alone():
    recency = create_method("recency:budget_fraction=0.5", paper_settings=True)
    assert recency.effective_config(100_000)["recency_tokens"] == 50_000
    random = create_method("random:budget_fraction=0.5", paper_settings=True)
    assert random.effective_config(100_000)["recency_tokens"] == 8192


def test_describe_gives_what_reports_print():
    for name in METHODS:
        described = create_method(name).describe()
        assert {"label", "name", "options", "stays", "saves", "source", "cost", "saving_kind"} == set(described)
        assert all(described[key] for key in described if key != "options")
        assert described["saving_kind"] in ("resident", "freed", "offloaded")
