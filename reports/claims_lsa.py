"""FlashMemory's claims (arXiv 2606.09079) from the rows of ``kvscope reproduce lsa``.

Ranges are fixed here, before anything is measured. Shares of bytes have one definition (``kvscope.results.share``).
"""

from collections.abc import Sequence

from kvscope.methods.lsa import printed as paper
from kvscope.reports.claim_rows import CellRows, Pooled, cell_rows, pooled_difference, pooled_share
from kvscope.reports.claims import Claim, at_scale
from kvscope.results.claims import Range
from kvscope.results.reproduction import TABLE_1_ROLES, Loaded
from kvscope.units import format_length

SHARE_MARGIN_PERCENT = 1.5
"""About the 13.5 %: rounding of the paper's table alone allows 11.9 to 14.3 %."""
GAIN_MARGIN_POINTS = 0.5
"""About the +0.6: so the range holds gains alone."""
NONINFERIOR_POINTS = -1.0
FAR_BELOW_POINTS = -20.0
"""Half of what the paper's ablations lose."""
MRCR_PERCENT = {"dense": 76.0, "lsa": 48.0}
MRCR_MARGIN_POINTS = 10.0
TABLE_2_PERCENT = {"LongMemEval-S 125K": (96.7, 95.0), "LongMemEval-M 500K": (91.2, 92.5)}
TABLE_2_GB = {"LongMemEval-S 125K": (0.46, 0.06), "LongMemEval-M 500K": (1.82, 0.16)}
TABLE_2_MARGIN_POINTS = 2.0
MOST_AT_500K_PERCENT = 10.0

PRINTED = "KV alone, as printed (13.1 %)"
WITH_HCA = "with HCA entries (15.4 %)"
WITH_KEYS = "with HCA entries and index keys (18.0 %)"
OURS_ALL = "KV, metadata and index keys (18.0 %)"


def lsa_claims(loaded: Loaded) -> list[Claim]:
    """Return every claim with what was measured of it, in the order of the paper."""
    if "claims" not in loaded.memo:
        loaded.memo["claims"] = _lsa_claims(loaded)
    found: list[Claim] = loaded.memo["claims"]
    return found


def _lsa_claims(loaded: Loaded) -> list[Claim]:
    rows = _cells(loaded, *TABLE_1_ROLES)
    planned = len(loaded.of_role(*TABLE_1_ROLES))
    source = byte_source(loaded)
    claims = [
        *_shares(rows, planned, source),
        *_at_500k(rows, source),
        *_accuracy(rows, planned),
        *_equal_bytes(rows, planned),
        _mrcr(loaded),
        *_nothing_needed(loaded, source),
        _training(),
        *_throughput(loaded),
        *_flops(rows),
    ]
    return [at_scale(claim, loaded.plan) for claim in claims]


def byte_source(loaded: Loaded) -> str:
    """Return what bytes rest on: the ledger, and what NVML said of it."""
    cell, run = next(iter(loaded.of_role("footprint")), (None, None))
    if run is None or not len(run.footprint):
        return f"ledger; NVML not measured: {cell.left_out if cell and cell.left_out else 'not run yet'}"
    told = run.footprint[run.footprint["method"] == "lsa"]
    parts = [
        f"{verdict or 'none'} at {format_length(int(length))}"
        for length, verdict in zip(told["length_tokens"], told["verdict"].astype(object), strict=True)
    ]
    return f"ledger; NVML: {', '.join(parts)}"


def _cells(loaded: Loaded, *roles: str) -> list[CellRows]:
    return [cell_rows(loaded, cell, run) for cell, run in loaded.of_role(*roles) if run is not None]


def _claim(pooled: Pooled, **fields: object) -> Claim:
    """A claim from fractions, in % or points."""
    interval = pooled.interval
    if interval is None:
        return Claim(missing=pooled.missing, **fields)  # type: ignore[arg-type]
    return Claim(
        ours=100 * interval.mean,
        low=None if interval.low is None else 100 * interval.low,
        high=None if interval.high is None else 100 * interval.high,
        n=pooled.n, lost=pooled.lost, won=pooled.won, missing=pooled.missing,
        **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def _shares(rows: Sequence[CellRows], planned: int, source: str) -> list[Claim]:
    mean = {
        name: 100 * sum(paper.pruned_fractions(row)[name] for row in paper.TABLE_1) / len(paper.TABLE_1)
        for name in ("with_hca", "with_hca_and_keys")
    }
    kept, full = sum(row.lsa_gb for row in paper.TABLE_1), sum(row.dense_gb for row in paper.TABLE_1)
    asked = {"unit": "%", "source": source}

    def around(value: float) -> Range:
        return Range.around(value, margin=SHARE_MARGIN_PERCENT)

    return [
        _claim(
            pooled_share(rows, accounting="kv", planned=planned), key="share_mean_of_ratios",
            text="lsa keeps 13.5 % of dense's KV: mean of the nine rows' ratios", accounting=PRINTED,
            paper=paper.CLAIMED_SHARE_PERCENT, asked=around(paper.CLAIMED_SHARE_PERCENT), **asked,
        ),
        Claim(
            key="share_mean_of_ratios_hca", text="the same, HCA entries counted", accounting=WITH_HCA,
            paper=mean["with_hca"], unmeasurable="the model has no HCA layers", **asked,  # type: ignore[arg-type]
        ),
        _claim(
            pooled_share(rows, accounting="all", planned=planned), key="share_mean_of_ratios_all",
            text="the same, everything on the device counted", accounting=OURS_ALL, paper=mean["with_hca_and_keys"],
            asked=around(mean["with_hca_and_keys"]), note="the paper's value is derived from its geometry", **asked,
        ),
        _claim(
            pooled_share(rows, accounting="kv", by_bytes=True, planned=planned), key="share_ratio_of_means",
            text="lsa keeps 10.7 % of dense's KV: ratio of the rows' means", accounting=PRINTED,
            paper=100 * kept / full, asked=around(100 * kept / full), **asked,
        ),
        _claim(
            pooled_share(rows, accounting="all", by_bytes=True, planned=planned), key="share_ratio_of_means_all",
            text="the same, everything on the device counted", accounting=OURS_ALL, paper=None,
            note="the paper prints no such figure", **asked,
        ),
    ]  # fmt: skip


def _at_500k(rows: Sequence[CellRows], source: str) -> list[Claim]:
    longest = sorted(paper.TABLE_1, key=lambda row: row.tokens)[-3:]
    claims = []
    for row in longest:
        mine = [cell for cell in rows if cell.plan.paper_row == row.label]
        for accounting, name in (("kv", PRINTED), ("all", OURS_ALL)):
            claims.append(
                _claim(
                    pooled_share(mine, accounting=accounting, planned=1),
                    key=f"share_at_{format_length(row.tokens).lower()}{'' if accounting == 'kv' else '_all'}",
                    text=f"lsa saves more than 90 % at 500K: {row.label}, share kept", accounting=name,
                    paper=100 * row.lsa_gb / row.dense_gb if accounting == "kv"
                    else 100 * paper.pruned_fractions(row)["with_hca_and_keys"],
                    unit="%", source=source, asked=Range(high=MOST_AT_500K_PERCENT),
                )
            )  # fmt: skip
    return claims


def _accuracy(rows: Sequence[CellRows], planned: int) -> list[Claim]:
    average = paper.TABLE_1_AVERAGE.accuracies_percent
    gain = pooled_difference(rows, "lsa", planned=planned)
    shared = {"unit": "points", "source": "answers, paired"}
    claims = [
        _claim(
            gain, key="gain", text="lsa gains 0.6 points over dense, mean of the nine rows",
            paper=paper.CLAIMED_GAIN_POINTS,
            asked=Range.around(paper.CLAIMED_GAIN_POINTS, margin=GAIN_MARGIN_POINTS), **shared,
        ),
        _claim(
            gain, key="noninferior", text="lsa loses less than one point to dense", paper=paper.CLAIMED_GAIN_POINTS,
            asked=Range(low=NONINFERIOR_POINTS), **shared,
        ),
    ]  # fmt: skip
    for name, words in (("recency", "Recency Only"), ("random", "Random 10 %")):
        claims.append(
            _claim(
                pooled_difference(rows, name, planned=planned), key=f"{name}_far_below",
                text=f"{words} falls far below dense", paper=average[name] - average["dense"],
                asked=Range(high=FAR_BELOW_POINTS), **shared,
            )
        )  # fmt: skip
    return claims


def _equal_bytes(rows: Sequence[CellRows], planned: int) -> list[Claim]:
    names = dict.fromkeys(name for cell in rows for name in cell.plan.methods if name.endswith("_equal"))
    claims = []
    for name in names:
        bare = name.removesuffix("_equal")
        held = [pooled_share(rows, accounting="all", name=each, planned=planned).interval for each in ("lsa", name)]
        shares = " and ".join("?" if each is None else f"{100 * each.mean:.1f} %" for each in held)
        claims.append(
            _claim(
                pooled_difference(rows, "lsa", name, planned=planned), key=f"better_than_{name}",
                text=f"lsa is better than {bare} at lsa's bytes", accounting=OURS_ALL, paper=None, unit="points",
                source="answers, paired", asked=Range(low=0.0), note=f"they hold {shares}",
            )
        )  # fmt: skip
    return claims


def _mrcr(loaded: Loaded) -> Claim:
    rows = _cells(loaded, "mrcr")
    claimed = MRCR_PERCENT["lsa"] - MRCR_PERCENT["dense"]
    return _claim(
        pooled_difference(rows, "lsa", planned=1), key="mrcr_falls", text="lsa falls on MRCR (76.0 to 48.0 %)",
        paper=claimed, unit="points", source="answers to long_qa_mrcr, paired",
        asked=Range.around(claimed, margin=MRCR_MARGIN_POINTS), note=_own_share(rows),
    )  # fmt: skip


def _own_share(rows: Sequence[CellRows]) -> str:
    share = pooled_share(rows, accounting="all", planned=1).interval
    return "" if share is None else f"lsa holds {100 * share.mean:.1f} % of dense's bytes there"


def _nothing_needed(loaded: Loaded, source: str) -> list[Claim]:
    rows, planned = _cells(loaded, "nothing_needed"), len(TABLE_2_PERCENT)
    claimed = sum(lsa - dense for dense, lsa in TABLE_2_PERCENT.values()) / planned
    share = 100 * sum(lsa / dense for dense, lsa in TABLE_2_GB.values()) / planned
    return [
        _claim(
            pooled_difference(rows, "lsa", planned=planned), key="nothing_needed_accuracy",
            text="lsa loses nothing where the question needs no context (Table 2)", paper=claimed, unit="points",
            source="answers to long_qa_no_context, paired",
            asked=Range.around(0.0, margin=TABLE_2_MARGIN_POINTS),
        ),
        _claim(
            pooled_share(rows, accounting="kv", planned=planned), key="nothing_needed_share",
            text="lsa's share there, mean of the two ratios (Table 2)", accounting=PRINTED, paper=share, unit="%",
            source=source, asked=Range.around(share, margin=SHARE_MARGIN_PERCENT),
        ),
    ]  # fmt: skip


def _training() -> Claim:
    return Claim(
        key="training_memory", text="the indexer is trained without the backbone in memory", paper=None, unit="%",
        source="peak resident memory",
        unmeasurable="no prompt shows it: benchmarks/lsa_train_memory.py measures the peak of `kvscope lsa train`",
    )  # fmt: skip


def _throughput(loaded: Loaded) -> list[Claim]:
    cell, run = next(iter(loaded.of_role("throughput")), (None, None))
    claims = []
    for served in paper.SERVED:
        length = format_length(served.tokens)
        fields = {
            "key": f"throughput_{length.lower()}", "text": f"lsa decodes more tokens a second at {length}, ratio",
            "paper": served.lsa_tokens_per_s / served.dense_tokens_per_s, "unit": "x",
            "source": "clock; Llama-3.1-8B's shape, random weights",
        }  # fmt: skip
        rows = None if run is None else run.throughput[run.throughput["length_tokens"] == served.tokens]
        if rows is None or not len(rows):
            why = (cell.left_out if cell is not None else None) or (
                "not run yet" if cell is not None and served.tokens in cell.lengths_tokens else "no cell is so long"
            )
            claims.append(Claim(unmeasurable=why, **fields))  # type: ignore[arg-type]
            continue
        rate = dict(zip(rows["method"], rows["tokens_per_s"].astype("float64"), strict=True))
        batch = dict(zip(rows["method"], rows["largest_batch"].astype("float64"), strict=True))
        note = f"{batch.get('lsa', 0):.0f} over {batch.get('dense', 0):.0f} sequences; another model, one card"
        ours = rate.get("lsa", float("nan")) / rate.get("dense", float("nan"))
        known = ours == ours and ours > 0
        claims.append(
            Claim(
                ours=ours if known else None,
                note=note if known else "a method did not fit",
                asked=Range.around(float(fields["paper"]), margin=0.2),  # type: ignore[arg-type]
                **fields,  # type: ignore[arg-type]
            )
        )
    return claims


def _flops(rows: Sequence[CellRows]) -> list[Claim]:
    claims = []
    for served in paper.SERVED:
        length = format_length(served.tokens)
        mine = next((cell for cell in rows if cell.plan.paper_row == f"RULER {length}"), None)
        note = ""
        if mine is not None and mine.n("lsa") and mine.n("dense"):
            each = {name: mine.rows(name)["attention_flops_per_step"].astype("float64").mean()
                    for name in ("lsa", "dense")}  # fmt: skip
            note = f"attention alone, of this model's row: {each['lsa'] / each['dense']:.2f}x"
        claims.append(
            Claim(
                key=f"flops_{length.lower()}", text=f"FLOPs of a decode token over dense's at {length}",
                paper=served.flop_ratio, unit="x", source="formula",
                unmeasurable="the printed ratio is DeepSeek-V4-Flash's: kvscope verify flashmemory recomputes it",
                note=note,
            )
        )  # fmt: skip
    return claims
