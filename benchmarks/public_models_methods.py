"""What ``public_models.py`` asks of methods: each as it frees bytes, reads less, or has no share.

Shares are of dense's bytes: those that a method holds, or those that it reads at a step.
"""

from collections.abc import Iterable

#: The folder of work's indexer, which methods name from inside of it.
INDEXER = "indexer"
#: Methods that hold less, at a share of the managed bytes.
FREEING = (
    "lsa:indexer=landmark", "snapkv", "pyramidkv", "adakv", "expected_attention", "knorm", "tova", "h2o", "recency",
    "random",
)  # fmt: skip
#: Methods that hold everything, at a share of the managed reads. Their blocks are summarised before a budget is known.
READING = ("quest", "moba:block_tokens=64")
#: What has no share: fewer bits, and msa, whose least reads are half of dense's.
WITHOUT_SHARE = ("dense:kv=fp8", "dense:kv=int8", "dense:kv=int4", "dense:kv=kivi2", "msa")


def at_share(method: str, share: float, *, option: str = "share") -> str:
    """Return a method's spec at a share of dense's bytes, of those it holds or of those it reads."""
    return f"{method}{',' if ':' in method else ':'}{option}={share:.5g}"


def tested(share: float, *, fitted: bool) -> list[str]:
    """Return what is tested against dense on all prompts of a length, at a share of dense's bytes."""
    fit = [at_share(f"lsa:indexer={INDEXER}", share), f"lsa:indexer={INDEXER}"] if fitted else []
    held = [at_share(method, share) for method in ("lsa:indexer=landmark", "recency", "random")]
    return ["dense", *fit, *held, *(at_share(method, share, option="read_share") for method in READING), "msa"]


def compared(shares: Iterable[float], *, fitted: bool) -> list[str]:
    """Return what stands beside them on fewer prompts, at shares of dense's bytes."""
    freeing = [f"lsa:indexer={INDEXER}", *FREEING] if fitted else FREEING
    found = ["dense", *WITHOUT_SHARE]
    for share in shares:
        found += [at_share(method, share) for method in freeing]
        found += [at_share(method, share, option="read_share") for method in READING]
    return found
