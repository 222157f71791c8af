"""Over compressed entries on a GPU, in bf16: what is collected there is learnt there, and decodes there."""

from pathlib import Path

import pytest
import torch
from compressed_tiny import random_model

from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.indexers.collection.collect import CollectConfig, collect
from kvscope.harness.indexers.collection.reading import Collection
from kvscope.harness.indexers.lsa.calibrate import CalibrateConfig, calibrate
from kvscope.harness.indexers.lsa.measuring import EvalConfig
from kvscope.harness.indexers.lsa.train import train
from kvscope.harness.indexers.lsa.train_config import TrainConfig
from kvscope.harness.passes.config import make_config
from kvscope.harness.passes.progress import Progress
from kvscope.harness.passes.sweep import failures, run

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_figure")]
LABELS = {"voters": "layer", "top_p": 0.9, "votes": 1, "least_mass": 0.01}


def collected(folder: Path, out: Path, device: str, dtype: str) -> Collection:
    asked = CollectConfig(
        model=str(folder), tasks=("niah_single_1",), lengths_tokens=(1024,), samples=4, seed=1000, least_mass=0.0001,
        answers="reference", device=device, dtype=dtype,
    )  # fmt: skip
    return Collection(collect(asked, out, progress=Progress()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoTokenizer

    where = tmp_path_factory.mktemp("models") / "tiny-v4"
    tokenizer = AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    random_model(vocab_size=len(tokenizer), index_topk=1024, **ends).save_pretrained(where)
    tokenizer.save_pretrained(where)
    return where


def test_a_gpu_records_what_a_cpu_records(folder: Path, tmp_path: Path) -> None:
    gpu, cpu = (collected(folder, tmp_path / device, device, "float32") for device in ("cuda", "cpu"))
    mine, theirs = gpu.load(0), cpu.load(0)
    for name in ("features", "hidden", "angles", "mass", "rest"):
        torch.testing.assert_close(
            getattr(mine, name).float(), getattr(theirs, name).float(), atol=2e-2, rtol=2e-2
        )  # fmt: skip


def test_bf16_documents_train_calibrate_and_decode(folder: Path, tmp_path: Path) -> None:
    data = collected(folder, tmp_path / "data", "cuda", "bfloat16").folder
    config = TrainConfig(tau=4, recency_tokens=64, **LABELS, epochs=2, held_out=0.3, keep="loss", device="cuda")
    train([data], tmp_path / "trained", config, note=lambda text: None)
    measure = EvalConfig(**LABELS, recency_tokens=64)
    found = calibrate(
        [data], str(tmp_path / "trained"), tmp_path / "set", CalibrateConfig(target_kept=0.6, measure=measure),
        device="cuda",
    )  # fmt: skip
    assert found["after"]["kept"] <= 0.6
    spec = f"lsa:indexer={tmp_path / 'set'},recency_tokens=64"
    asked = {
        "model": str(folder), "methods": ["dense", spec, f"{spec},policy=pages,page_tokens=64,pages=4"],
        "tasks": ["niah_single_1"], "lengths_tokens": [1024], "samples": 2, "max_new_tokens": 12, "footprint": False,
        "device": "cuda", "dtype": "bfloat16",
    }  # fmt: skip
    shown = run(make_config(asked), out=tmp_path / "run", progress=False)
    assert not failures(shown)
    lsa = shown.samples[shown.samples["method"] == "lsa"]
    assert len(lsa) == 4
    assert (lsa["resident_kv_bytes"] < lsa["dense_kv_bytes"]).all()
    assert all(row["residency"]["indexer"].startswith("set@") for row in lsa.to_dict("records"))
