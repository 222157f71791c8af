"""Shared by the tests of dsa: lightning indexers of random weights, and shards whose attention is planted."""

import torch

from kvscope.harness.indexers.collection.document import CollectionInfo, Document, DocumentInfo
from kvscope.harness.indexers.collection.shards import write_manifest, write_shard
from kvscope.methods.dsa.indexer_files import FILES
from kvscope.methods.dsa.lightning import Lightning, LightningConfig

M, F, QF, STEPS, LAYERS = 24, 12, 12, 6, (1, 3)


def random_indexer(folder, shape, *, seed=0, **changes):
    """Write an indexer of random weights for a model's shape."""
    options = {
        "model": "tiny", "model_revision": shape.revision, "layers": shape.layers, "hidden_size": shape.hidden_size,
        "heads": 3, "key_dim": 8,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        FILES.save(Lightning(LightningConfig(**{**options, **changes})), folder)
    return folder


def planted_info(*, n_tokens=320, samples=40, seed=0, token_samples=100, **changes):
    return CollectionInfo(
        **{
            "model": "ghost", "model_revision": "sha256:none", "dtype": "float32", "hidden_size": M, "key_features": F,
            "query_heads": 2, "head_dim": 6, "kv_bytes_per_token": 96, "layers": LAYERS, "label_layers": LAYERS,
            "chunk_tokens": 16, "features": "stats", "top_p": 0.6, "voters": "layer", "least_mass": 0.0, "votes": 1,
            "state_tokens": 4, "tasks": ("planted",), "lengths_tokens": (n_tokens,), "samples": samples, "seed": seed,
            "token_samples": token_samples, **changes,
        }
    )  # fmt: skip


def planted_document(info, sample):
    """A token's state holds a code, a step's state the code of the token it attends to: 0.7 of it, or nearly."""
    draws = torch.Generator().manual_seed(1000 * info.seed + sample)
    n_tokens, L = info.lengths_tokens[0], len(info.layers)
    codes = torch.randn((n_tokens, F), generator=draws)
    states = torch.cat([codes, torch.randn((n_tokens, M - F), generator=draws)], 1)
    golden = torch.randint(0, n_tokens, (STEPS,), generator=draws)
    hidden = torch.randn((info.state_tokens + STEPS, L, M), generator=draws)
    hidden[info.state_tokens :, :, F:] = 2 * codes[golden][:, None]
    mass = torch.full((STEPS, L, n_tokens), 0.2 / n_tokens)
    mass[torch.arange(STEPS), :, golden] += 0.7
    step_mass = torch.zeros((STEPS, L, STEPS))
    step_mass[torch.arange(STEPS), :, torch.arange(STEPS)] = 0.1
    kept = torch.zeros(n_tokens, dtype=torch.bool)
    kept[golden] = True
    others = (~kept).nonzero()[:, 0]
    weights = torch.ones(n_tokens)
    if info.token_samples and len(others) > info.token_samples:
        kept[others[torch.randperm(len(others), generator=draws)[: info.token_samples]]] = True
        weights[others] = len(others) / info.token_samples
    else:
        kept[:] = True
    tokens = kept.nonzero()[:, 0]
    n_chunks = n_tokens // info.chunk_tokens
    token_tensors = {
        "tokens": tokens.int(),
        "token_weights": weights[tokens],
        "token_states": states[tokens].expand(L, -1, -1).bfloat16(),
        "token_keys": codes[tokens].expand(L, -1, -1).bfloat16(),
        "token_mass": mass[..., tokens].half(),
        "step_mass": step_mass.half(),
    }
    return Document(
        info=DocumentInfo(
            task="planted", question_type="planted", length_tokens=n_tokens, sample=sample, prompt_tokens=n_tokens,
            n_steps=STEPS,
        ),
        features=torch.zeros((L, n_chunks, 3, F)).bfloat16(),
        hidden=hidden.bfloat16(),
        steps=torch.arange(STEPS, dtype=torch.int32),
        segments=torch.zeros(STEPS, dtype=torch.int32),
        indptr=torch.zeros(STEPS + 1, dtype=torch.int32),
        indices=torch.zeros(0, dtype=torch.int32),
        voters=torch.zeros(0, dtype=torch.int16),
        values=torch.zeros(0).half(),
        rest=torch.zeros((STEPS, L + 2 * L)).half(),
        mass=torch.zeros((STEPS, n_chunks)).half(),
        queries=hidden[info.state_tokens :, :, F:].bfloat16(),
        **(token_tensors if info.token_samples else {}),
    )  # fmt: skip


def planted_collection(folder, **options):
    """Write a collection of planted documents."""
    info = planted_info(**options)
    folder.mkdir(parents=True, exist_ok=True)
    made = [planted_document(info, sample) for sample in range(info.samples)]
    size_bytes = write_shard(folder / "shard-00000.safetensors", made, info)
    shard = {"file": "shard-00000.safetensors", "bytes": size_bytes, "documents": [vars(each.info) for each in made]}
    write_manifest(folder, info, [shard], complete=True)
    return folder
