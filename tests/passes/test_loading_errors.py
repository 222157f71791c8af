"""Damaged models: ``plan`` refuses each in one sentence, from headers alone, and no code of a model ever runs."""

import json
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import save_tiny

from kvscope import cli
from kvscope.errors import UsageError
from kvscope.harness.engine import models
from kvscope.harness.engine.models import load_model
from kvscope.harness.passes.facts import describe_model

Damage = Callable[[Path], Any]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "good")


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "tiny"))


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*args: Any) -> str:
        raise AssertionError(f"the terminal was asked: {args}")

    monkeypatch.setattr("builtins.input", asked)


def config(**changes: Any) -> Damage:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def write(name: str, content: bytes | str) -> Damage:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def weights(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / WEIGHTS).write_bytes(change((folder / WEIGHTS).read_bytes()))


def index(shard: str) -> Damage:
    """One file becomes two by an index: the file, and ``shard``."""

    def change(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "model-1.safetensors")
        weight_map = {"model.norm.weight": "model-1.safetensors", "no.such.tensor": shard}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return change


def pickled(content: Any) -> Damage:
    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return change


class Planted:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("planted",)


def only(name: str) -> Damage:
    """Leave an empty JSON file of this name, and nothing else."""

    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_text("{}")

    return change


def remote_code(folder: Path) -> None:
    config(model_type="own", auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)
    (folder / "own.py").write_text("import os\nos.mkdir('planted')\n")


def remote_tokenizer(folder: Path) -> None:
    (folder / "own.py").write_text("import os\nos.mkdir('planted')\n")
    auto_map = {"AutoTokenizer": ["own.Tokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Own", "auto_map": auto_map}))


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def more_tokens(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<word{index}>" for index in range(50)])
    tokenizer.save_pretrained(folder)


def ends_with_eos(folder: Path) -> None:
    path = folder / "tokenizer.json"
    text, eos = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    special = {"<eos>": {"id": "<eos>", "ids": [0], "tokens": ["<eos>"]}}
    template = {"type": "TemplateProcessing", "single": [text, eos], "pair": [text], "special_tokens": special}
    path.write_text(json.dumps({**json.loads(path.read_text()), "post_processor": template}))


def of_type(name: str, **sizes: Any) -> Damage:
    return lambda folder: getattr(transformers, name)(**sizes).save_pretrained(folder)


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else than a regular file has the file's name."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link(path: Path) -> None:
    path.symlink_to("/nowhere/at/all")


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def changed(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return changed


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
V5_ROPE = {"rope_type": "default", "rope_theta": 1e6}
Q_PROJ = "model.layers.0.self_attn.q_proj"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "fewer-layers-than-weights": (config(num_hidden_layers=3), r"leaves no place for model\.layers\.3\."),
    "bias-without-a-place": (
        tensors(lambda held: {**held, f"{Q_PROJ}.bias": torch.ones(64)}),
        f"leaves no place for {Q_PROJ}.bias",
    ),
    "whole-numbers": (
        tensors(lambda held: {**held, f"{Q_PROJ}.weight": held[f"{Q_PROJ}.weight"].to(torch.int8)}),
        f"hold {Q_PROJ}.weight as I8, and its config names no quantisation",
    ),
    "named-weights-gone": (config(transformers_weights="own.safetensors"), "lacks 'own.safetensors', which its config"),
    "pickle-list": (pickled([1, 2]), "pytorch_model.bin holds no tensors by name"),
    "pickle-empty": (
        lambda folder: (pickled({})(folder), write("pytorch_model.bin", b"")(folder)),
        "pytorch_model.bin is cut off or damaged",
    ),
    "adapter-beside-the-weights": (write("adapter_config.json", "{}"), "an adapter lies beside its weights"),
    "weights-pipe": (instead(WEIGHTS, os.mkfifo), "model.safetensors is no regular file"),
    "weights-link": (instead(WEIGHTS, link), "model.safetensors is a link to nothing"),
    "shard-link": (
        lambda folder: (index("model-2.safetensors")(folder), link(folder / "model-2.safetensors")),
        "model-2.safetensors is a link to nothing",
    ),
    # transformers passes over these: the model would run without its end tokens, its BOS or its template.
    "generation-config-link": (instead("generation_config.json", link), "generation_config.json is a link to nothing"),
    "tokenizer-config-folder": (instead("tokenizer_config.json", Path.mkdir), "tokenizer_config.json is a folder"),
    "chat-template-pipe": (instead("chat_template.jinja", os.mkfifo), "chat_template.jinja is no regular file"),
    "generation-config-list": (write("generation_config.json", "[]"), "generation_config.json holds no JSON object"),
    "generation-config-nested": (write("generation_config.json", "[" * 100_000), "nested too deeply"),
    "generation-config-eos": (
        write("generation_config.json", '{"eos_token_id": [1, "x"]}'),
        r"eos_token_id in generation_config.json is \[1, 'x'\]",
    ),
    "special-tokens-list": (write("special_tokens_map.json", "[]"), "special_tokens_map.json holds no JSON object"),
    "tokenizer-of-nothing": (write("tokenizer.json", "{}"), "tokenizer.json holds no tokenizer"),
    "config-json": (write("config.json", "{bad"), "config.json is not valid JSON"),
    "config-nested": (write("config.json", "[" * 100_000), "config.json is not valid JSON"),
    "config-list": (write("config.json", "[]"), "config.json holds no JSON object"),
    "config-bytes": (write("config.json", b"\xff\xfe\x00"), "config.json is not valid JSON"),
    "no-model-type": (write("config.json", "{}"), "no model_type"),
    "unknown-model-type": (config(model_type="nosuch"), "`nosuch`"),
    "size-of-a-wrong-type": (config(num_hidden_layers="four"), "'num_hidden_layers' expected int"),
    "negative-layers": (config(num_hidden_layers=-2), "num_hidden_layers is -2"),
    "millions-of-layers": (config(num_hidden_layers=3_000_000), "num_hidden_layers is 3,000,000"),
    # transformers 5 passes over the base beside it, and fills in its own.
    "rope-scaling-beside-a-base": (
        config(rope_parameters=V5_ROPE, rope_scaling=YARN),
        "rope_scaling in its config makes the base of RoPE 10,000, where rope_parameters say 1,000,000",
    ),
    "no-heads": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "heads-that-do-not-divide": (config(num_key_value_heads=3), "no multiple of its 3 KV heads"),
    "negative-vocabulary": (config(vocab_size=-5), "vocab_size is -5"),
    "unknown-rope": (config(rope_parameters={"rope_type": "nosuch"}), "'nosuch'"),
    "unknown-activation": (config(hidden_act="nosuch"), "'nosuch'"),
    "remote-code": (remote_code, "kvscope runs no code that comes with a model"),
    "remote-tokenizer": (remote_tokenizer, "kvscope runs no code that comes with a model"),
    "no-tokenizer": (no_tokenizer, "no tokenizer.json"),
    "tokenizer-json": (write("tokenizer.json", "{bad"), "tokenizer.json is not valid JSON"),
    "tokenizer-config-json": (write("tokenizer_config.json", "{"), "tokenizer_config.json is not valid JSON"),
    "tokenizer-above-the-embedding": (more_tokens, "token ids up to 306"),
    "tokenizer-ends-prompts": (ends_with_eos, "ends every prompt with '<eos>'"),
    "weights-cut": (weights(lambda held: held[: len(held) // 2]), "cut off or damaged"),
    "weights-header-length": (weights(lambda held: struct.pack("<Q", 1 << 60) + held[8:]), "cut off or damaged"),
    "weights-header": (weights(lambda held: held[:8] + b"x" * 50 + held[58:]), "cut off or damaged"),
    "weights-empty": (weights(lambda held: b""), "cut off or damaged"),
    "weights-lfs": (write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\nsize 1\n"), "Git LFS pointer"),
    "weights-gone": (lambda folder: (folder / WEIGHTS).unlink(), "neither model.safetensors nor pytorch_model.bin"),
    "shard-gone": (index("model-2.safetensors"), "lacks model-2.safetensors"),
    "shard-lacks-a-tensor": (index("model-1.safetensors"), "model-1.safetensors lacks no.such.tensor"),
    "pickle-with-code": (pickled({"lm_head.weight": Planted()}), "which could run code"),
    "pickle-garbage": (lambda folder: (pickled({})(folder), write("pytorch_model.bin", "bad")(folder)), "damaged"),
    "kv-heads": (config(num_key_value_heads=4), r"k_proj.weight as \[32, 64\], and its config makes it \[64, 64\]"),
    "layers-without-weights": (config(num_hidden_layers=5), "its weights lack model.layers.4"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantisation .*requires"),
    "unknown-quantisation": (config(quantization_config={"quant_method": "nosuch"}), "no quant_method 'nosuch'"),
    "quantisation-of-a-wrong-type": (config(quantization_config="4 bits"), "quantization_config in its config"),
    "fp8-on-a-cpu": (config(quantization_config={"quant_method": "fp8"}), "fp8 weights need a GPU"),
    "mxfp4-on-a-cpu": (config(quantization_config={"quant_method": "mxfp4"}), "mxfp4 weights need a GPU"),
    "metal-elsewhere": (config(quantization_config={"quant_method": "metal"}), "metal weights do not run on this mach"),
    "sinq": (config(quantization_config={"quant_method": "sinq"}), "needs the package sinq"),
    "adapter": (only("adapter_config.json"), "it holds an adapter"),
    "gguf": (only("model.gguf"), "does not begin with 'GGUF'"),
    "diffusers": (only("model_index.json"), "a diffusers pipeline"),
    "not-a-language-model": (of_type("ViTConfig"), "a vit is no causal language model"),
    "state-space": (of_type("RwkvConfig"), "cannot be"),
}
# Types that only their code gives away: (config, its sizes, the reason). No weights are there.
CODE: dict[str, tuple[str, dict[str, Any], str]] = {
    **{
        name: (f"{name}Config", {"is_decoder": True}, "its decoder has 0 layers")
        for name in ("Bert", "Camembert", "Electra", "Ernie", "Roberta", "RobertaPreLayerNorm", "XLMRoberta", "Xmod")
    },
    "DiffLlama": ("DiffLlamaConfig", {}, "attend more than once"),
    "Doge": ("DogeConfig", {}, "asks for attention_mask"),
    "JetMoe": ("JetMoeConfig", {}, "does not go through transformers' attention interface"),
    "BigBirdPegasus": (
        "BigBirdPegasusConfig",
        {"is_encoder_decoder": False, "is_decoder": True, "d_model": 64, "decoder_layers": 2, "encoder_layers": 2}
        | {"decoder_attention_heads": 4, "encoder_attention_heads": 4},
        "attention that is not causal",
    ),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_model_is_one_sentence_to_plan_and_to_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    damage(folder)
    with pytest.raises(UsageError, match=reason) as planned:
        describe_model(str(folder), device="cpu")
    assert "\n" not in str(planned.value)
    assert str(folder) in str(planned.value)
    with pytest.raises(UsageError, match=reason):
        load_model(str(folder), device="cpu")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(("name", "sizes", "reason"), CODE.values(), ids=list(CODE))
def test_a_type_that_its_code_gives_away_is_refused_before_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, sizes: dict[str, Any], reason: str
) -> None:
    loads = transformers.AutoModelForCausalLM
    monkeypatch.setattr(loads, "from_pretrained", lambda *args, **options: pytest.fail("weights were loaded"))
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    of_type(name, **{**small, "vocab_size": 300, "num_key_value_heads": 2, **sizes})(folder)
    (folder / WEIGHTS).unlink()
    for describe in (describe_model, load_model):
        with pytest.raises(UsageError, match=f"Model '{folder}' cannot be run: .*{reason}"):
            describe(str(folder), device="cpu")


def test_quantised_weights_that_ask_to_be_plain_run_on_a_cpu(folder: Path) -> None:
    config(quantization_config={"quant_method": "fp8", "dequantize": True})(folder)
    assert describe_model(str(folder), device="cpu").weights_bytes
    assert load_model(str(folder), device="cpu").dtype == torch.float32


class Heard(logging.Handler):
    """What transformers prints."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def heard() -> Iterator[list[str]]:
    logger, handler = transformers.logging.get_logger(), Heard()
    logger.addHandler(handler)
    yield handler.texts
    logger.removeHandler(handler)


def test_transformers_table_of_missing_tensors_is_not_printed_before_the_sentence(
    folder: Path, heard: list[str]
) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / WEIGHTS)
    held["another.name"] = held.pop("model.norm.weight")  # names that agree no longer: found only while loading
    save_file(held, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="its weights lack 1 tensor"):
        load_model(str(folder), device="cpu")
    assert heard == []


def test_what_transformers_warns_of_a_model_that_runs_is_printed(folder: Path, heard: list[str]) -> None:
    from safetensors.torch import load_file, save_file

    held = load_file(folder / WEIGHTS)
    save_file({**held, "vision.tower.weight": held["model.norm.weight"].clone()}, folder / WEIGHTS, {"format": "pt"})
    load_model(str(folder), device="cpu")
    assert any("vision.tower.weight" in text for text in heard)


def test_a_run_over_damaged_weights_leaves_no_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_model", lambda *args, **options: pytest.fail("weights were loaded"))
    DAMAGES["weights-cut"][0](folder)
    arguments = ("--model", str(folder), "-m", "dense", "--task", "niah_single_1", "-l", "512", "-n", "1")
    for command in (["plan"], ["run", "--out", str(tmp_path / "run")]):
        assert cli.run_cli([*command, *arguments, "--device", "cpu"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def special_token(folder: Path) -> None:
    """An image token above the embedding, as Gemma 3's text models have: no text makes it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)


def known_code(folder: Path) -> None:
    """A type that transformers knows, with code of its own beside: the code is left alone."""
    config(auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"})(folder)
    (folder / "own.py").write_text("import os\nos.mkdir('planted')\n")


def pickled_weights(folder: Path) -> None:
    from safetensors.torch import load_file

    pickled(load_file(folder / WEIGHTS))(folder)


def shard_in_a_folder(folder: Path) -> None:
    """Where transformers looks for it, too."""
    from safetensors.torch import load_file

    names = list(load_file(folder / WEIGHTS))
    (folder / "shards").mkdir()
    (folder / WEIGHTS).rename(folder / "shards" / WEIGHTS)
    weight_map = dict.fromkeys(names, f"shards/{WEIGHTS}")
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def named_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "own.safetensors")
    config(transformers_weights="own.safetensors")(folder)


def named_attention(folder: Path) -> None:
    """transformers takes the attention of the file before the one it is told, and the package is not here."""
    config(_attn_implementation="flash_attention_2")(folder)


def further_layer(folder: Path) -> None:
    """A layer for multi-token prediction behind the decoder's."""
    config(num_nextn_predict_layers=1)(folder)
    named = "model.layers.4.self_attn.q_proj.weight"
    tensors(lambda held: {**held, named: held[f"{Q_PROJ}.weight"].clone()})(folder)


def scaled_rope(folder: Path) -> None:
    """A base of its own in what takes the other's place."""
    config(rope_parameters=V5_ROPE, rope_scaling={**YARN, "rope_theta": 1e6})(folder)


def scaled_rope_of_version_4(folder: Path) -> None:
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written.pop("rope_parameters")
    path.write_text(json.dumps({**written, "rope_theta": 1e6, "rope_scaling": YARN}))


ODD = [
    special_token, known_code, pickled_weights, shard_in_a_folder, named_weights, named_attention, further_layer,
    scaled_rope, scaled_rope_of_version_4,
]  # fmt: skip


@pytest.mark.parametrize("change", ODD)
def test_what_is_odd_but_whole_loads(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Damage
) -> None:
    monkeypatch.chdir(tmp_path)
    change(folder)
    facts = describe_model(str(folder), device="cpu")
    assert load_model(str(folder), device="cpu").revision == facts.revision
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("spec", ["~nobody-of-this-name/x", "x" * 300, "/" + "x" * 300])
def test_names_that_no_folder_can_have(spec: str) -> None:
    with pytest.raises(UsageError, match=r"no such user has a home here|too long to be a path"):
        describe_model(spec)


def test_the_end_of_memory_is_no_fault_of_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_model(str(folder), device="cpu")
