"""The phases of the small DeepSeek-V4: the reference model's curriculum, lengths doubled as soon as one is learnt.

Steps are what 45 minutes of one H200 have room for twice over (README.md has seconds): most of them go where documents
and variable chains are learnt, which took the reference model some 6,000 steps of rows to 32K and longer.
"""

from kvscope.harness.reference_model.curriculum import Phase, Shape

_EARLY = (("long_qa", 0.2), ("vt_fixed", 0.1))
_STORIES = (("long_qa", 0.28), ("vt", 0.12))
_COMPOSED = (("long_qa_2", 0.35), ("vt", 0.12))


def _one(tokens: int, rows: int, questions: int) -> tuple[Shape, ...]:
    return (Shape(tokens=tokens, rows=rows, questions=questions),)


_TO_2K = (
    Shape(tokens=512, rows=80, questions=10, share=0.25),
    Shape(tokens=2048, rows=20, questions=24, share=0.75),
)
_TO_8K = (
    Shape(tokens=1024, rows=40, questions=16, share=0.2),
    Shape(tokens=2048, rows=24, questions=24, share=0.3),
    Shape(tokens=8192, rows=6, questions=48, share=0.5),
)
_TO_32K = (
    Shape(tokens=2048, rows=24, questions=24, share=0.3),
    Shape(tokens=8192, rows=6, questions=48, share=0.4),
    Shape(tokens=32_768, rows=2, questions=80, share=0.3),
)
_TO_128K = (
    Shape(tokens=2048, rows=24, questions=24, share=0.25),
    Shape(tokens=8192, rows=6, questions=48, share=0.35),
    Shape(tokens=32_768, rows=2, questions=80, share=0.3),
    Shape(tokens=131_072, rows=1, questions=120, share=0.1),
)
V4_PHASES = (
    Phase(name="v0-64", shapes=_one(64, 256, 3), steps=2500, lr=(2e-3, 2e-3), copy_share=0.3, recall_share=0.7,
          warmup_steps=100, enough=0.92),
    Phase(name="v1-128", shapes=_one(128, 192, 4), steps=1500, lr=(2e-3, 2e-3), copy_share=0.2, recall_share=0.35,
          warmup_steps=100, enough=0.9),
    Phase(name="v2-256", shapes=_one(256, 128, 6), steps=1000, lr=(2e-3, 2e-3), copy_share=0.1, recall_share=0.1,
          warmup_steps=50, enough=0.93),
    Phase(name="v3-512", shapes=_one(512, 80, 10), steps=1000, lr=(1.5e-3, 1.5e-3), copy_share=0.05, documents=_EARLY,
          warmup_steps=50, enough=0.95),
    Phase(name="v4-2k", shapes=_TO_2K, steps=1500, lr=(1.5e-3, 1.5e-3), documents=_EARLY, warmup_steps=50,
          enough=0.965),
    Phase(name="v5-8k", shapes=_TO_8K, steps=2500, lr=(1.5e-3, 1e-3), documents=_STORIES, warmup_steps=50,
          enough=0.975),
    Phase(name="v6-32k", shapes=_TO_32K, steps=5000, lr=(1e-3, 5e-5), documents=_COMPOSED, more_uuids=0.25,
          warmup_steps=50),
    Phase(name="v7-128k", shapes=_TO_128K, steps=800, lr=(5e-4, 2e-5), documents=_COMPOSED, more_uuids=0.25,
          warmup_steps=50),
    Phase(name="v8-indexer", shapes=_TO_32K, steps=500, lr=(2e-3, 2e-4), documents=_COMPOSED, more_uuids=0.25,
          warmup_steps=20, objective="indexer"),
    Phase(name="v9-sparse", shapes=_TO_32K, steps=500, lr=(2e-4, 2e-5), documents=_COMPOSED, more_uuids=0.25,
          warmup_steps=20, objective="sparse"),
)  # fmt: skip
