"""Files of the query side of an indexer over compressed entries: both namings, and what else a file may be."""

import os
import pickle

import pytest
import torch
from compressed_tiny import tiny_config
from safetensors.torch import save_file

from kvscope.errors import UsageError
from kvscope.harness.backends.deepseek_v4.backend import DeepseekV4
from kvscope.methods.lsa.compressed import CompressedIndexer
from kvscope.methods.lsa.compressed_files import MATRICES, compressed_indexer_hash, load_compressed_indexer
from kvscope.methods.registry import create_method

M, RANK, HEADS, DIM = 48, 24, 6, 16
#: DeepSeek-V4-Flash's compressed-sparse layers: the released ordinals 10, 12 and 20 are 22, 26 and 42.
FLASH_CSA = tuple(range(2, 43, 2))
RELEASED = {
    "wq_a.weight": "w_dq_RM",
    "q_norm_weight": "norm_R",
    "wq_b.weight": "w_iuq_OR",
    "weights_proj.weight": "w_w_IM",
}


@pytest.fixture
def indexer() -> CompressedIndexer:
    return CompressedIndexer.random((3, 7), hidden_size=M, rank=RANK, heads=HEADS, key_dim=DIM, seed=4)


def load(path):
    return load_compressed_indexer(path, csa_layers=FLASH_CSA)


def released_state(*ordinals, hidden_size=M, heads=HEADS, key_dim=DIM, rotations=True):
    """A state dict with the released checkpoint's keys, small shapes and random values, as it was trained (bf16)."""
    drawn = CompressedIndexer.random(ordinals, hidden_size=hidden_size, rank=RANK, heads=heads, key_dim=key_dim, seed=9)
    state = {
        f"retrievers.l{ordinal}.{name}": getattr(weights, field).bfloat16()
        for ordinal, weights in drawn.layers.items()
        for name, field in RELEASED.items()
    }
    if rotations:
        state |= {f"retrievers.l{ordinal}.freqs_cis": torch.ones(64, 4, dtype=torch.complex64) for ordinal in ordinals}
    return state


@pytest.mark.parametrize("ending", ["pt", "legacy.pt", "safetensors"])
def test_the_released_checkpoint_loads_at_the_layers_it_was_trained_for(tmp_path, ending):
    state, file = released_state(10, 12, 20, rotations=ending != "safetensors"), tmp_path / f"top3.{ending}"
    if ending == "safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=ending == "pt")
    loaded = load(file)
    assert list(loaded.layers) == [22, 26, 42]
    for ordinal, layer in ((10, 22), (12, 26), (20, 42)):
        for name, field in RELEASED.items():
            assert torch.equal(getattr(loaded.layers[layer], field), state[f"retrievers.l{ordinal}.{name}"].float())
    assert (loaded.layers[22].heads, loaded.layers[22].key_dim) == (HEADS, DIM)
    assert compressed_indexer_hash(file).startswith(f"top3.{ending}@")


def test_a_released_checkpoint_chooses_on_a_model(tmp_path):
    """The tiny model's compressed-sparse layers are 1 and 4: ordinals 0 and 1."""
    shape = DeepseekV4().shape(tiny_config(), element_bytes=4)
    state = released_state(0, 1, hidden_size=shape.hidden_size, heads=4, key_dim=shape.index_key_dim)
    torch.save(state, tmp_path / "weights.pt")
    method = DeepseekV4().form_of(create_method(f"lsa:indexer={tmp_path / 'weights.pt'},tau=4"), shape)
    assert method.unsupported(shape, "cpu") == []
    assert method.observed_layers(shape) == (1, 4) == shape.layers
    assert method.trained_part(shape) == compressed_indexer_hash(tmp_path / "weights.pt").rpartition("@")[2]


class Trap:
    """Unpickled, it would make a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def without(state, name):
    return {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda s: without(s, "retrievers.l12.q_norm_weight"), "lacks norm of layer 26"),
        (lambda s: s | {"retrievers.l12.bias": torch.ones(2)}, "'retrievers.l12.bias', which is no tensor"),
        (lambda s: s | {"retrievers.l12.wq_b.weight": torch.ones(7, RANK)}, "layer 26: W_IUQ has 7 rows"),
        (lambda s: s | {"retrievers.l12.wq_a.weight": torch.ones(RANK)}, "layer 26: .*do not fit together"),
        (lambda s: s | {"retrievers.l12.wq_a.weight": torch.ones(RANK, M, 2)}, "layer 26: .*do not fit together"),
        (lambda s: s | {"retrievers.l12.weights_proj.weight": torch.ones(0, M)}, "layer 26: .*do not fit together"),
        (lambda s: s | {"retrievers.l12.weights_proj.weight": torch.ones(HEADS, M).int()}, "has type int32"),
        (lambda s: s | {"retrievers.l12.weights_proj.weight": torch.ones(HEADS, M).to_sparse()}, "expected plain"),
        (lambda s: s | {"retrievers.l12.q_norm_weight": torch.full((RANK,), torch.inf)}, "not finite .*l12.q_norm"),
        (lambda s: s | {"retrievers.l12.q_norm_weight": torch.ones(1).expand(10**12)}, "larger than what the file"),
        (lambda s: s | {"retrievers.l12.q_norm_weight": 1.0}, "is a float, expected a tensor"),
        (lambda s: s | released_state(21), "compressed-sparse layer 21, counted from 0, and this model has 21 of them"),
        (lambda s: s | {"layers.22.W_DQ.weight": torch.ones(RANK, M)}, "W_DQ of layer 22 a second time"),
        (lambda s: list(s.values()), "hold a list, expected tensors by name"),
        (lambda s: {}, "holds no tensor"),
    ],
)
def test_a_checkpoint_that_is_not_right_is_one_sentence(tmp_path, changes, words):
    torch.save(changes(released_state(10, 12, 20)), tmp_path / "w.pt")
    with pytest.raises(UsageError, match=words) as caught:
        load(tmp_path / "w.pt")
    assert "\n" not in str(caught.value)


def test_a_pickle_with_code_is_not_run(tmp_path):
    made = tmp_path / "made"
    torch.save({"retrievers.l10.wq_a.weight": Trap(made)}, tmp_path / "code.pt")
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Trap(made)))
    for name in ("code.pt", "bare.pt"):
        with pytest.raises(UsageError, match="hold more than tensors, which could run code and was not read"):
            load(tmp_path / name)
    assert not made.exists()


def test_a_damaged_checkpoint_is_named(tmp_path):
    torch.save(released_state(10), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for cut in (0, 1, 7, 500, len(whole) // 2, len(whole) - 30):
        (tmp_path / "cut.pt").write_bytes(whole[:cut])
        with pytest.raises(UsageError, match=r"cut\.pt"):
            load(tmp_path / "cut.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UsageError, match="no regular file"):
        load(tmp_path / "pipe.pt")
    with pytest.raises(UsageError, match=r"absent\.pt"):
        load(tmp_path / "absent.pt")


def save(path, indexer, **changes):
    fields = {"W_DQ": "w_dq_RM", "norm": "norm_R", "W_IUQ": "w_iuq_OR", "W_w": "w_w_IM"}
    tensors = {
        f"layers.{layer}.{name}.weight": getattr(weights, fields[name]).clone()
        for layer, weights in indexer.layers.items()
        for name in MATRICES
    }
    tensors.update(changes)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_released_weights_load_as_they_were(tmp_path, indexer):
    loaded = load(save(tmp_path / "w.safetensors", indexer))
    assert list(loaded.layers) == [3, 7]
    for layer, weights in indexer.layers.items():
        assert (weights.heads, weights.key_dim) == (HEADS, DIM)
        for name in ("w_dq_RM", "norm_R", "w_iuq_OR", "w_w_IM"):
            assert torch.equal(getattr(loaded.layers[layer], name), getattr(weights, name))


def test_the_other_spelling_loads_from_a_folder_of_bf16_shards(tmp_path, indexer):
    fields = {"wq_a": "w_dq_RM", "q_norm": "norm_R", "wq_b": "w_iuq_OR", "weights_proj": "w_w_IM"}
    for layer, weights in indexer.layers.items():
        shard = {
            f"model.layers.{layer}.self_attn.indexer.{name}.weight": getattr(weights, field).bfloat16()
            for name, field in fields.items()
        }
        save_file(shard, tmp_path / f"shard-{layer}.safetensors")
    loaded = load(tmp_path)
    for layer, weights in indexer.layers.items():
        assert torch.equal(loaded.layers[layer].w_iuq_OR, weights.w_iuq_OR.bfloat16().float())
    before = compressed_indexer_hash(tmp_path)
    assert before == compressed_indexer_hash(tmp_path)
    (tmp_path / "shard-3.safetensors").unlink()
    assert compressed_indexer_hash(tmp_path) != before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers.3.W_w.weight": None}, "lacks W_w of layer 3"),
        ({"layers.3.indexer.wq_a.weight": torch.ones(2)}, "W_DQ of layer 3 a second time"),
        ({"layers.3.W_q.weight": torch.ones(2)}, r"layers\.3\.W_q\.weight"),
        ({"layers.3.W_DQ.weight": torch.ones(RANK, M, dtype=torch.int8)}, "has type I8"),
        ({"layers.3.W_DQ.weight": torch.full((RANK, M), torch.nan)}, r"not finite \(.*layers.3.*W_DQ"),
        ({"layers.7.W_DQ.weight": torch.ones(RANK + 1, M)}, "layer 7: .*do not fit together"),
        ({"layers.7.W_IUQ.weight": torch.ones(HEADS * 12, RANK)}, "power of two"),
    ],
)
def test_damaged_weights_are_named(tmp_path, indexer, changes, words):
    with pytest.raises(UsageError, match=words):
        load(save(tmp_path / "w.safetensors", indexer, **changes))


def test_a_missing_or_foreign_file_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    (tmp_path / "empty").mkdir()
    for name in ("x.safetensors", "absent.safetensors", "empty"):
        with pytest.raises(UsageError, match=name):
            load(tmp_path / name)
