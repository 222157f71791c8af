"""The documents that `v4_lsa.py` makes indexers from, the layers it indexes, and a tiny model for a try on a CPU."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import indexers_data as documents
from indexers_data import CALIBRATION, EVALUATION, LSA, ONE, QA, SEVERAL, Group, K, Unit

from kvscope.errors import UsageError
from kvscope.harness.engine.names import REFERENCE_MODEL_FOLDER
from kvscope.harness.indexers.collection.collect import CollectConfig
from kvscope.harness.indexers.collection.label_choice import LabelChoice
from kvscope.harness.indexers.collection.reading import Collection

LEAST_MASS = 0.001
"""Smaller masses are not stored: of flat scores, of which the paper's top-p takes smaller ones, fewer are labelled."""
ASKED = (*ONE, *SEVERAL, *QA)
"""Tasks of the table."""
GROUPS = (
    Group(LSA, "qa", QA, 4 * K, 9, 7000, 8),
    Group(LSA, "several", SEVERAL, 4 * K, 4, 7050, 8),
    Group(LSA, "one", ONE, 4 * K, 4, 7100, 6),
    Group(LSA, "qa", QA, 8 * K, 9, 7150, 10),
    Group(LSA, "several", SEVERAL, 8 * K, 4, 7200, 10),
    Group(LSA, "one", ONE, 8 * K, 3, 7250, 6),
    Group(LSA, "qa", QA, 16 * K, 9, 7300, 10),
    Group(LSA, "several", SEVERAL, 16 * K, 3, 7350, 10),
    Group(LSA, "one", ONE, 16 * K, 2, 7400, 6),
    Group(LSA, "qa", QA, 32 * K, 6, 7450, 8),
    Group(LSA, "several", SEVERAL, 32 * K, 2, 7500, 8),
    Group(CALIBRATION, "asked", ASKED, 8 * K, 1, 7600, 4),
    Group(CALIBRATION, "asked", ASKED, 16 * K, 1, 7650, 4),
    Group(CALIBRATION, "asked", ASKED, 32 * K, 1, 7700, 4),
    # Seeds of evaluation are below 1000; those of the table are others.
    Group(EVALUATION, "asked", ASKED, 8 * K, 1, 60, 4),
    Group(EVALUATION, "asked", ASKED, 32 * K, 1, 70, 4),
)


def tiny_groups() -> tuple[Group, ...]:
    """Return short units, a few documents of every role: whether it runs, not how good it is."""
    small = replace(GROUPS[0], length_tokens=documents.TINY_TOKENS, units=1)
    return tuple(
        replace(small, role=role, samples=samples, first_seed=seed)
        for role, samples, seed in ((LSA, 2, 7000), (CALIBRATION, 1, 7600), (EVALUATION, 1, 60))
    )


@dataclass(frozen=True)
class EntryUnit(Unit):
    """One collection over compressed entries: all compressed-sparse layers, and both kinds of voters."""

    def config(self, model: str, *, device: str) -> CollectConfig:
        """Return what to collect, in one shard."""
        return CollectConfig(
            model=model, tasks=self.group.tasks, lengths_tokens=(self.group.length_tokens,),
            samples=self.group.samples, seed=self.seed, least_mass=LEAST_MASS, shard_documents=self.group.documents,
            answers="own", device=device,
        )  # fmt: skip


def indexed_layers(asked: str, folders: Sequence[Path], labels: LabelChoice) -> tuple[tuple[int, ...], dict[int, int]]:
    """Return the layers to index, ascending, and how many votes each layer gave.

    Args:
        asked: ``all``, a number (so many layers, those of the most votes), or layers with commas.

    Raises:
        UsageError: it is none of these, or names a layer that was not recorded.
    """
    info = Collection(folders[0]).info
    votes: Counter[int] = Counter(dict.fromkeys(info.label_layers, 0))
    for folder in folders[:: max(1, len(folders) // 16)]:
        collection = Collection(folder)
        for index in range(len(collection)):
            document = collection.load(index)
            for layer in info.label_layers:
                rule = replace(labels, label_layers=(layer,)).rule(info)
                votes[layer] += int(document.votes(rule, info).sum())
    try:
        named = tuple(sorted(int(each) for each in asked.split(","))) if asked != "all" else info.layers
    except ValueError:
        raise UsageError(f"--layers is {asked!r}: give all, a number of layers, or layers with commas.") from None
    if asked.isdecimal() and int(asked) <= len(info.layers):
        named = tuple(sorted(layer for layer, _ in votes.most_common(int(asked))))
    if not named or set(named) - set(info.layers):
        raise UsageError(
            f"--layers is {asked!r}: this model's compressed-sparse layers are {', '.join(map(str, info.layers))}."
        )
    return named, dict(sorted(votes.items()))


def tiny_model(folder: Path) -> Path:
    """Make a tiny model with random weights; it is made once."""
    import torch
    from transformers import AutoTokenizer, DeepseekV4ForCausalLM

    from kvscope.harness.reference_model.v4.architecture import CSA, HCA, SLIDING, v4_config

    if (folder / "config.json").is_file():
        return folder
    layer_types = [SLIDING, CSA, HCA, CSA, CSA, CSA]
    config = v4_config(
        layer_types=layer_types, num_hidden_layers=len(layer_types), mlp_layer_types=["moe"] * len(layer_types),
        hidden_size=64, moe_intermediate_size=48, num_attention_heads=4, head_dim=32, q_lora_rank=32, o_lora_rank=16,
        index_n_heads=8, index_head_dim=16, index_topk=64, hc_mult=2, hc_sinkhorn_iters=3, max_position_embeddings=8192,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DeepseekV4ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.mul_(3.0)
            if name.endswith(("sinks", "position_bias")):
                parameter.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(REFERENCE_MODEL_FOLDER)).save_pretrained(folder)
    return folder
