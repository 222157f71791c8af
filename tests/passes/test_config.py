"""Configuration: precedence, lengths, specs, and one clear sentence for each kind of bad input."""

import json
from pathlib import Path

import pytest

from kvscope.errors import UsageError
from kvscope.harness.passes.config import RunConfig, load_config, make_config
from kvscope.harness.passes.served_keys import SERVED_KEYS
from kvscope.specs import Spec, parse_spec
from kvscope.units import format_length, parse_length


@pytest.mark.parametrize(
    ("given", "tokens"), [("1k", 1024), ("4K", 4096), ("1M", 1024 * 1024), ("100", 100), (100, 100), ("1.5k", 1536)]
)
def test_lengths_are_read_with_binary_units(given: object, tokens: int) -> None:
    assert parse_length(given) == tokens


@pytest.mark.parametrize(
    ("text", "asked"),
    [("on", "on"), ("off", "off"), ("auto", "auto"), ('"on"', "on"), ("true", "on"), ("No", "off"), ("On", "on")],
)
def test_a_bare_on_or_off_is_meant_as_written(tmp_path: Path, text: str, asked: str) -> None:
    """YAML reads them as booleans."""
    file = tmp_path / "sweep.yaml"
    file.write_text(f"model: preset:tiny\nmethods: [dense]\ndecode_graph: {text}\n")
    assert load_config(file).decode_graph == asked
    assert make_config({"model": "preset:tiny", "methods": ["dense"], "decode_graph": asked}).decode_graph == asked


@pytest.mark.parametrize("given", ["sometimes", 1, None, ["on"]])
def test_another_word_for_decode_graph_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match="'auto', 'on' or 'off'"):
        make_config({"model": "preset:tiny", "methods": ["dense"], "decode_graph": given})


@pytest.mark.parametrize("given", ["", "k", "4q", "-1", "0", 0, -5, 1.5, "1.0001k", True, None, [], "1e3"])
def test_what_is_no_length_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match="not a length"):
        parse_length(given)


@pytest.mark.parametrize(("tokens", "text"), [(1024, "1K"), (131072, "128K"), (2**20, "1M"), (1000, "1000")])
def test_lengths_are_written_as_they_are_read(tokens: int, text: str) -> None:
    assert format_length(tokens) == text
    assert parse_length(text) == tokens


def test_defaults_yaml_flags_and_set_win_in_that_order(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("samples: 2\nseed: 2\nmodel: two\nlengths_tokens: [1k, 2048]\n")
    config = load_config(file, flags={"seed": 3, "model": "three", "dtype": None}, sets=["model=four"])
    assert (config.samples, config.seed, config.model) == (2, 3, "four")
    assert config.lengths_tokens == (1024, 2048)
    assert config.dtype == RunConfig().dtype


def test_set_reads_its_value_as_yaml() -> None:
    config = load_config(sets=["methods=[dense, {name: random, fraction: 0.2}]", "footprint=false", "out=x=y"])
    assert config.methods == (Spec("dense"), Spec("random", (("fraction", "0.2"),)))
    assert config.footprint is False
    assert config.out == "x=y"


def test_lengths_are_sorted_and_unique() -> None:
    assert make_config({"lengths_tokens": ["4k", "1k", 4096]}).lengths_tokens == (1024, 4096)


def test_footprint_lengths_default_to_lengths_and_are_empty_when_off() -> None:
    assert make_config({"lengths_tokens": ["1k"]}).footprint_cells_tokens == (1024,)
    assert make_config({"lengths_tokens": ["1k"], "footprint_lengths_tokens": ["2k"]}).footprint_cells_tokens == (2048,)
    assert make_config({"lengths_tokens": ["1k"], "footprint": False}).footprint_cells_tokens == ()


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("24GiB", 24 * 1024**3), ("1.5 GB", 1_500_000_000), (4096, 4096), ("512 KiB", 512 * 1024)]
)
def test_sizes_take_binary_and_decimal_units(text: object, size_bytes: int) -> None:
    assert make_config({"gpu_budget_bytes": text}).gpu_budget_bytes == size_bytes


@pytest.mark.parametrize("text", ["24 gigs", "0GiB", "-1", True, ""])
def test_other_sizes_are_refused(text: object) -> None:
    with pytest.raises(UsageError, match=r"expected (a whole number|at least 1)"):
        make_config({"gpu_budget_bytes": text})


def test_text_and_mapping_are_the_same_spec() -> None:
    text, mapping = "random:seed=3,fraction=0.5", {"name": "random", "fraction": 0.5, "seed": 3}
    assert make_config({"methods": [text]}).identity() == make_config({"methods": [mapping]}).identity()


def test_identity_ignores_where_the_rows_go_but_nothing_that_changes_them() -> None:
    base = make_config({"out": "a"})
    assert (
        base.identity()
        == make_config({"out": "b", "footprint_timeout_s": 5.0, "time_limit_s": 9.0, "retry": False}).identity()
    )
    changed = {
        "model": "other",
        "methods": ["dense"],
        "tasks": ["niah_single_1"],
        "lengths_tokens": [512],
        "samples": 3,
        "seed": 9,
        "method_from": "question",
        "answer_nll": True,
        "max_new_tokens": 7,
        "paper_settings": True,
        "footprint": False,
        "footprint_lengths_tokens": [512],
        "kv": "synthetic",
        "gpu_budget_bytes": "24GiB",
        "find_max": True,
        "find_max_resolution": 0.1,
        "find_max_limit_tokens": "64k",
        "throughput": True,
        "max_batch": 8,
        "footprint_decode_tokens": 5,
        "footprint_batch": 2,
        "device": "cpu",
        "dtype": "float16",
        "prefill_chunk_tokens": 512,
        "page_tokens": 16,
        "decode_graph": "off",
        "accuracy_graph": True,
    }
    assert set(changed) == set(RunConfig.model_fields) - {
        "out",
        "jobs",
        "gpus",
        "executor",
        "ray_address",
        "chat_template",  # the plan says what it comes to
        "device_map",
        "footprint_timeout_s",
        "time_limit_s",
        "retry",
        "self_check",
        "batch",
        *SERVED_KEYS,  # a server's run has an identity of its own
    }
    for key, value in changed.items():
        assert make_config({key: value}).identity() != base.identity(), key


def test_folders_begun_before_steps_could_be_captured_go_on() -> None:
    assert "accuracy_graph" not in make_config({"accuracy_graph": False}).identity()
    assert make_config({"accuracy_graph": True}).identity()["accuracy_graph"] is True


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sampels": 3}, "Unknown key 'sampels' in the configuration. Did you mean 'samples'?"),
        ({"samples": 0}, "samples in the configuration is 0, expected at least 1."),
        ({"samples": -3}, "samples in the configuration is -3, expected at least 1."),
        ({"samples": "many"}, "samples in the configuration is 'many', expected a whole number."),
        ({"samples": True}, "samples in the configuration is True, expected a whole number."),
        ({"footprint": "maybe"}, "footprint in the configuration is 'maybe', expected true or false."),
        ({"footprint": 1}, "footprint in the configuration is 1, expected true or false."),
        ({"model": 3}, "model in the configuration is 3, expected text."),
        ({"method_from": "x"}, "method_from in the configuration is 'x', expected 'last_token' or 'question'."),
        ({"methods": [3]}, "methods in the configuration is 3, expected a list of names such as dense."),
        ({"methods": []}, "methods: at least one method is needed."),
        ({"methods": ["dense", "dense"]}, "methods: 'dense' is given twice: keep one."),
        ({"tasks": ["niah_single_1", "niah_single_1"]}, "tasks: 'niah_single_1' is given twice: keep one."),
        (
            {"methods": ["random:fraction"]},
            "'fraction' in method 'random:fraction' is not key=value: write random:key=value,key=value.",
        ),
        ({"methods": [{"fraction": 1}]}, "A method given as a mapping needs a 'name', got {'fraction': 1}."),
        ({"device": "gpu"}, "device: 'gpu' is not a device: write auto, cpu, cuda or cuda:N."),
    ],
)
def test_bad_values_are_one_sentence(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        make_config(values)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "spec", ["random:", ":a=1", "random:a", "random:=1", "random:a=", "random:a=1,", "random:a=1,a=2"]
)
def test_malformed_specs_are_refused(spec: str) -> None:
    with pytest.raises(UsageError):
        parse_spec(spec, kind="method")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "does not exist"),
        ("samples: [", "line 1 is not valid YAML"),
        ("- 1\n- 2\n", "must hold `key: value` lines"),
        ("seeed: 1", "Did you mean 'seed'?"),
        ("seed: 1\nsamples: 2\nseed: 3\n", "key 'seed' is given twice"),
        ("methods:\n- name: random\n  seed: 1\n  seed: 2\n", "key 'seed' is given twice from line 2 on"),
    ],
)
def test_bad_files_are_one_sentence_that_names_the_file(tmp_path: Path, text: str | None, sentence: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UsageError, match=r"run\.yaml") as caught:
        load_config(file)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("item", ["samples", "=3", ""])
def test_malformed_set_is_refused(item: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        load_config(sets=[item])


def test_an_error_names_the_source_it_came_from() -> None:
    with pytest.raises(UsageError, match="in the options"):
        load_config(flags={"samples": 0})
    with pytest.raises(UsageError, match="in --set"):
        load_config(flags={"samples": 1}, sets=["samples=0"])


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"samples": 0}, "samples in RunConfig is 0, expected"),
        ({"seeed": 1}, "Unknown key 'seeed'"),
        ({"methods": ["nosuch:"]}, "nosuch"),
        (5, "RunConfig is 5, expected a mapping"),
        (None, "RunConfig is None, expected a mapping"),
    ],
)
def test_pydantics_own_ways_in_give_the_same_sentences(given: object, sentence: str) -> None:
    for read in (RunConfig.model_validate, lambda values: RunConfig.model_validate_json(json.dumps(values))):
        with pytest.raises(UsageError, match=sentence) as caught:
            read(given)
        assert "Value error" not in str(caught.value)
        assert "\n" not in str(caught.value)
    config = RunConfig(samples=3)
    assert RunConfig.model_validate(config) is config
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
