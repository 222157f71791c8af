"""What was printed of FlashMemory-DeepSeek-V4, number by number, each with its place. Data alone; no torch.

Two sources: the paper (arXiv 2606.09079), and the technical report of its repository, libertywing/FlashMemory-
Deepseek-V4 (TECHNICAL_REPORT_en.md at 91b3460). What is derived from them is in ``harness/studies/flashmemory``.
"""

from dataclasses import dataclass

from kvscope.methods.compressed_bytes import FLASH_FP8
from kvscope.units import format_length

_K = 1024

ABSTRACT = "arXiv 2606.09079, abstract"
TABLE_1_SOURCE = "arXiv 2606.09079, Table 1"
DEPLOYED_SOURCE = "arXiv 2606.09079, serving"
THROUGHPUT_SOURCE = "technical report, 6.1"
FLOPS_SOURCE = "technical report, 6.2"
LONGMEMEVAL_SOURCE = "Table 1; LongMemEval (arXiv 2410.10813) has 500 questions"
LONGBENCH_SOURCE = "Table 1; LongBench v2 (arXiv 2412.15204): 180 short, 215 medium, 108 long"
NOISE_SOURCE = "Table 1; sglang #30514 (n = 334)"
DEPLOYED_RATIO_SOURCE = "technical report, 1"
EXAMPLE_SOURCE = "worked example of the claim; not in the paper"

N_INDEXED_LAYERS = 3
"""Layers the paper indexes."""
INDEXED_ORDINALS = (10, 12, 20)
"""Which of the compressed-sparse layers they are, counted from 0."""
INDEXER_RANK, INDEXER_HEADS, INDEXER_KEY_DIM = 2048, 128, 128
TAU = 64
"""Decode steps between refreshes."""

CLAIMED_SHARE_PERCENT = 13.5
"""Average KV footprint over that of the full context (abstract)."""
CLAIMED_GAIN_POINTS = 0.6
"""Average accuracy gain (abstract)."""
CLAIMED_SAVING_PERCENT = 90.0
"""Least saving "at extreme 500K scales" (abstract)."""


@dataclass(frozen=True, kw_only=True)
class PaperRow:
    """One row of Table 1: accuracies in %, GPU KV in GB as printed, to two digits."""

    name: str
    tokens: int
    dense_percent: float
    dense_gb: float
    lsa_percent: float
    lsa_gb: float
    recency_percent: float
    recency_gb: float
    random_percent: float
    random_gb: float

    @property
    def label(self) -> str:
        """Name and length, which together tell rows apart."""
        return f"{self.name} {format_length(self.tokens)}"

    @property
    def accuracies_percent(self) -> dict[str, float]:
        """Column -> accuracy."""
        return {
            "dense": self.dense_percent,
            "lsa": self.lsa_percent,
            "recency": self.recency_percent,
            "random": self.random_percent,
        }


_TABLE_1: tuple[tuple[str, int, float, float, float, float, float, float, float, float], ...] = (
    ("LongBench-v2-S", 46 * _K, 68.9, 0.17, 70.2, 0.04, 50.0, 0.03, 53.3, 0.04),
    ("LongBench-v2-M", 179 * _K, 67.6, 0.65, 68.9, 0.08, 54.4, 0.03, 48.9, 0.09),
    ("LongBench-v2-L", 493 * _K, 68.1, 1.80, 70.0, 0.18, 54.3, 0.04, 46.9, 0.22),
    ("LongMemEval-S", 125 * _K, 80.6, 0.46, 82.0, 0.06, 19.2, 0.04, 20.1, 0.07),
    ("LongMemEval-M", 500 * _K, 39.3, 1.82, 40.2, 0.17, 23.1, 0.04, 25.7, 0.22),
    ("RULER", 64 * _K, 94.7, 0.23, 95.0, 0.04, 36.6, 0.03, 52.8, 0.05),
    ("RULER", 128 * _K, 94.3, 0.47, 93.2, 0.06, 21.6, 0.03, 32.3, 0.08),
    ("RULER", 256 * _K, 90.5, 0.94, 88.2, 0.09, 20.6, 0.04, 41.2, 0.12),
    ("RULER", 512 * _K, 88.3, 1.87, 89.6, 0.18, 18.8, 0.04, 27.2, 0.22),
)


def _row(name: str, tokens: int, *values: float) -> PaperRow:
    dense, dense_gb, lsa, lsa_gb, recency, recency_gb, drawn, random_gb = values
    return PaperRow(
        name=name, tokens=tokens, dense_percent=dense, dense_gb=dense_gb, lsa_percent=lsa, lsa_gb=lsa_gb,
        recency_percent=recency, recency_gb=recency_gb, random_percent=drawn, random_gb=random_gb,
    )  # fmt: skip


TABLE_1 = tuple(_row(*values) for values in _TABLE_1)
TABLE_1_AVERAGE = _row("average", 0, 76.9, 0.93, 77.5, 0.10, 33.3, 0.04, 38.7, 0.12)
"""The row of averages as printed; it has no length."""

LONGMEMEVAL_QUESTIONS = 500
LONGBENCH_QUESTIONS = {"LongBench-v2-S": 180, "LongBench-v2-M": 215, "LongBench-v2-L": 108}
"""Questions of LongBench v2 by the length of their context."""
LONGBENCH_NOISE_POINTS = 2.7
"""How far single runs of that set differ, half width (n = 334)."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """One row of the technical report's tables 6.1 and 6.2, on 8 H20.

    Attributes:
        tokens: of the context.
        recalled_pages: K_max, most pages of 64 entries that are recalled.
        dense_streams, lsa_streams: requests at once.
        dense_tokens_per_s, lsa_tokens_per_s: of all streams together.
        speedup: throughput over the baseline's, as printed.
        dense_gflop, lsa_gflop, flop_ratio: of one decode token, "whole model".
    """

    tokens: int
    recalled_pages: int
    dense_streams: int
    dense_tokens_per_s: int
    lsa_streams: int
    lsa_tokens_per_s: int
    speedup: float
    dense_gflop: float
    lsa_gflop: float
    flop_ratio: float


SERVED = (
    Served(
        tokens=256 * _K, recalled_pages=96, dense_streams=47, dense_tokens_per_s=1584, lsa_streams=76,
        lsa_tokens_per_s=2759, speedup=1.7, dense_gflop=50.8, lsa_gflop=28.8, flop_ratio=0.57,
    ),
    Served(
        tokens=512 * _K, recalled_pages=192, dense_streams=25, dense_tokens_per_s=1028, lsa_streams=60,
        lsa_tokens_per_s=2008, speedup=2.0, dense_gflop=73.5, lsa_gflop=31.0, flop_ratio=0.42,
    ),
    Served(
        tokens=1024 * _K, recalled_pages=384, dense_streams=11, dense_tokens_per_s=455, lsa_streams=30,
        lsa_tokens_per_s=1266, speedup=2.8, dense_gflop=118.9, lsa_gflop=35.4, flop_ratio=0.30,
    ),
)  # fmt: skip
PAGE_ENTRIES = 64
"""Entries of one page that is recalled: 256 tokens."""
RECENCY_TOKENS = 8192
"""Last tokens of the prompt that always stay."""
CONSTANT_GFLOP = 26.6
"""Of a decode token, whatever the context: experts, projections, compressors, output head (technical report, 6.2)."""
DEPLOYED_GB = 0.37
"""KV of a stream at 1M tokens under LSA."""
DEPLOYED_SHARE_PERCENT = 10.0
"""Share of the history that stays, "about 10 %" (technical report, 1)."""

EXAMPLE_PRESET = "preset:llama-2-7b"
EXAMPLE_BYTES_PER_TOKEN = 524_288
EXAMPLE_TOKENS = 500 * _K
EXAMPLE_DENSE_GB, EXAMPLE_LSA_GB = 40.0, 5.4


def pruned_fractions(row: PaperRow) -> dict[str, float]:
    """Return the pruned cache over the full one in three accountings, fractions.

    ``printed`` is the ratio of the two printed figures. The other two add, by our derivation, what the printed pruned
    figure seems to leave out: the HCA layers' entries, which are never pruned, and the indexed layers' own keys of the
    whole context, which must stay on the device to be scored.
    """
    dense = FLASH_FP8.bytes_per_token
    hca = FLASH_FP8.hca_bytes_per_token / dense
    keys = N_INDEXED_LAYERS * FLASH_FP8.key_bytes / FLASH_FP8.csa_rate / dense
    printed = row.lsa_gb / row.dense_gb
    return {"printed": printed, "with_hca": printed + hca, "with_hca_and_keys": printed + hca + keys}
