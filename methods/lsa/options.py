"""The options of ``lsa``, checked. No torch."""

from dataclasses import dataclass

from kvscope.methods.budget import check_budget
from kvscope.methods.lsa.layout import bounds_error
from kvscope.units import Tokens

DEFAULT_CHUNK_TOKENS = 64
DEFAULT_TAU = 64
#: Values of ``indexer`` that need no trained one.
ATTENTION, HINDSIGHT, LANDMARK = "attention", "hindsight", "landmark"
#: Share of the prompt that ``landmark`` keeps where no budget is given: its scores are no probabilities to a threshold.
LANDMARK_BUDGET_FRACTION = 0.25
#: Values of ``policy``.
THRESHOLD, PAGES = "threshold", "pages"
DEFAULT_SINK_TOKENS = 4
#: Of the deployed rule (FlashMemory-DeepSeek-V4, technical report): 96 pages of 256 tokens at 256K tokens, 192 at 512K.
DEPLOYED_PAGE_TOKENS, DEPLOYED_PAGES, DEPLOYED_LENGTH_TOKENS = 256, 96, 256 * 1024
#: What versions to 0.2 called ``attention``: folders and rows of it keep their labels.
OLDER_ATTENTION = "oracle"


@dataclass(frozen=True, kw_only=True)
class LsaConfig:
    """Options of ``lsa``.

    Attributes:
        tau: decode steps between refreshes of the resident set; none: those the indexer was trained for, 64 without a
            trained one.
        mode: how chunks are kept, by threshold (all that score enough) or by budget (a fixed number, those that score
            most); none: by budget when one is given.
        threshold: in threshold mode, least score of a kept chunk, between 0 and 1; with indexer=attention the share of
            a layer's attention that the kept chunks reach together with what always stays; with indexer=hindsight the
            share that they reach, at each step and layer, of what all chunks to choose from get.
        budget_tokens: in budget mode, prompt tokens that stay, sinks and window included (both stay even if they alone
            are more).
        budget_fraction: the same as a fraction of the prompt's tokens.
        cap_tokens: in threshold mode, the most prompt tokens that stay, sinks and window included: of a larger choice
            the best chunks are kept; none: without cap_fraction the indexer's cap, without one any number.
        cap_fraction: the same as a fraction of the prompt's tokens; with cap_tokens the larger of the two. Either
            takes the place of the indexer's cap.
        least_tokens: in threshold mode, the least prompt tokens that stay, sinks and window included: where fewer reach
            the threshold, the best of the other chunks fill up, within the cap; none: without least_fraction the
            indexer's, without one whatever reaches the threshold.
        least_fraction: the same as a fraction of the prompt's tokens; with least_tokens the larger of the two. Either
            takes the place of the indexer's; 0 sets that aside.
        chunk_tokens: tokens of a chunk; none: the indexer's own (of several shipped the first by name), 64 without a
            trained one.
        policy: threshold (chunks by their own scores), or pages (the rule FlashMemory deploys: a page scores the number
            of its chunks that reach the threshold, and a fixed number of pages stays, the densest).
        page_tokens: with policy=pages, tokens of a page; a multiple of a chunk's.
        pages: with policy=pages, pages that stay beside the window; none: those a budget has room for, without one the
            deployed 96 at 256K tokens, in proportion to the prompt.
        sink_tokens: first prompt tokens that always stay, widened to whole chunks; none: 4, and 0 with policy=pages.
        recency_tokens: last prompt tokens that always stay, widened to whole chunks; none: min(8192, max(128,
            length / 64)).
        refresh: sync (the recall ends before the step) or stale1 (copied behind the running interval, read from the
            next one on); none: sync, and stale1 with policy=pages.
        fallback_ratio: a choice of more than this share of the candidate chunks makes the interval dense; none: never.
        indexer: folder or shipped name of a trained indexer, on deepseek_v4 models a file of weights; or attention
            (each layer chooses by its own attention at the refreshing step, read from the host; the steps after it may
            need others); or hindsight (what the steps of each interval attended to in a first, dense decode: what
            predicting could reach; answers only); or landmark (the model's own last queries, against bounds of each
            chunk's keys; by budget, a quarter of the prompt unless set); none: the one shipped for this model and chunk
            size.
        selection: trained, or synthetic (an indexer of random weights: right bytes and times, meaningless accuracy).
        seed: of the synthetic indexer.
        churn: with selection=synthetic, share of the resident chunks that a refresh replaces, between 0 and 1; none:
            what the reference model's trained indexer was measured to replace at this tau (docs/measurement.md).
    """

    tau: int | None = None
    mode: str | None = None
    threshold: float = 0.5
    budget_tokens: Tokens | None = None
    budget_fraction: float | None = None
    cap_tokens: Tokens | None = None
    cap_fraction: float | None = None
    least_tokens: Tokens | None = None
    least_fraction: float | None = None
    chunk_tokens: Tokens | None = None
    policy: str = THRESHOLD
    page_tokens: Tokens = DEPLOYED_PAGE_TOKENS
    pages: int | None = None
    sink_tokens: Tokens | None = None
    recency_tokens: Tokens | None = None
    refresh: str | None = None
    fallback_ratio: float | None = None
    indexer: str | None = None
    selection: str = "trained"
    seed: int = 0
    churn: float | None = None

    def __post_init__(self) -> None:
        budgeted = self.budget_tokens is not None or self.budget_fraction is not None
        by_landmark = self.indexer == LANDMARK
        for name, value, known in (
            ("mode", self.mode or "threshold", ("threshold", "budget")),
            ("refresh", self.refresh or "sync", ("sync", "stale1")),
            ("policy", self.policy, (THRESHOLD, PAGES)),
            ("selection", self.selection, ("trained", "synthetic")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
        self._normalise()
        self._check_pages()
        if by_landmark and (self.mode == "threshold" or self.threshold != 0.5 or self.capped or self.filled):
            raise ValueError(
                "indexer=landmark scores by no probability, so no threshold, no cap and no least share of one apply; "
                "give budget_tokens or budget_fraction"
            )
        if self.mode == "budget" and not (budgeted or by_landmark):
            raise ValueError("mode=budget needs budget_tokens or budget_fraction")
        if self.mode == "threshold" and budgeted:
            raise ValueError("a budget belongs to mode=budget; leave mode out or drop the budget")
        if budgeted and self.threshold != 0.5 and self.policy != PAGES:
            raise ValueError("give a threshold or a budget, not both")
        if self.budget_tokens is not None and self.budget_fraction is not None:
            raise ValueError("give budget_tokens or budget_fraction, not both")
        if self.budget_tokens is not None and self.budget_tokens < 0:
            raise ValueError(f"budget_tokens must be 0 or more, got {self.budget_tokens}")
        check_budget(None, self.budget_fraction)
        if error := bounds_error(
            cap_tokens=self.cap_tokens, cap_fraction=self.cap_fraction,
            least_tokens=self.least_tokens, least_fraction=self.least_fraction,
        ):  # fmt: skip
            raise ValueError(error)
        if self.filled and budgeted:
            given = "least_fraction" if self.least_tokens is None else "least_tokens"
            raise ValueError(f"{given} fills up what a threshold keeps; a budget keeps a fixed number")
        if self.capped:
            given = "cap_fraction" if self.cap_tokens is None else "cap_tokens"
            if budgeted:
                raise ValueError(f"{given} bounds what a threshold keeps; a budget is its own bound")
            if self.fallback_ratio is not None:
                raise ValueError(f"give {given} or fallback_ratio: what one cuts, the other makes whole")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, both excluded, got {self.threshold}")
        if self.tau is not None and self.tau < 1:
            raise ValueError(f"tau must be 1 or more, got {self.tau}")
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be 1 or more, got {self.chunk_tokens}")
        if self.sink_tokens is not None and self.sink_tokens < 0:
            raise ValueError(f"sink_tokens must be 0 or more, got {self.sink_tokens}")
        if self.recency_tokens is not None and self.recency_tokens < 0:
            raise ValueError(f"recency_tokens must be 0 or more, got {self.recency_tokens}")
        if self.fallback_ratio is not None and not 0 < self.fallback_ratio < 1:
            raise ValueError(f"fallback_ratio must lie between 0 and 1, both excluded, got {self.fallback_ratio}")
        if self.selection == "synthetic" and self.indexer is not None:
            raise ValueError("selection=synthetic draws its own indexer, so indexer cannot be given")
        if self.indexer == HINDSIGHT and self.effective_refresh == "stale1":
            raise ValueError(
                "refresh=stale1 would bring what indexer=hindsight knows of an interval one interval late; leave it out"
            )
        if self.churn is not None and not 0 <= self.churn <= 1:
            raise ValueError(f"churn must be between 0 and 1, got {self.churn}")
        if self.churn is not None and self.selection != "synthetic":
            raise ValueError("churn belongs to selection=synthetic: a trained indexer replaces what it chooses to")
        if self.selection == "synthetic" and not budgeted:
            raise ValueError(
                "selection=synthetic needs a budget: the scores of random weights mean nothing to a threshold"
            )

    def _normalise(self) -> None:
        """Take an option that says what holds anyway for one not given: labels of one method are one."""
        given = {"refresh": self.refresh, "sink_tokens": self.sink_tokens}
        for name, value in given.items():
            if value is not None and value == self._unless_given(name):
                object.__setattr__(self, name, None)

    def _unless_given(self, name: str) -> str | int:
        paged = self.policy == PAGES
        return {"refresh": "stale1" if paged else "sync", "sink_tokens": 0 if paged else DEFAULT_SINK_TOKENS}[name]

    def _check_pages(self) -> None:
        if self.policy != PAGES:
            if self.pages is not None or self.page_tokens != DEPLOYED_PAGE_TOKENS:
                raise ValueError("pages and page_tokens belong to policy=pages")
            return
        budgeted = self.budget_tokens is not None or self.budget_fraction is not None
        if not self.indexed or self.selection != "trained":
            raise ValueError(
                "policy=pages counts chunks that reach a threshold, which needs the scores of a trained indexer"
            )
        if self.mode is not None or self.capped or self.filled or self.fallback_ratio is not None:
            raise ValueError(
                "policy=pages keeps a fixed number of pages, so mode, a cap, a least share and fallback_ratio do not "
                "apply"
            )
        if self.page_tokens < 1:
            raise ValueError(f"page_tokens must be 1 or more, got {self.page_tokens}")
        if self.pages is not None and self.pages < 0:
            raise ValueError(f"pages must be 0 or more, got {self.pages}")
        if self.pages is not None and budgeted:
            raise ValueError("give pages or a budget, not both")

    @property
    def effective_refresh(self) -> str:
        """When what a refresh chooses is read, by default or as given."""
        return str(self._unless_given("refresh")) if self.refresh is None else self.refresh

    @property
    def effective_sink_tokens(self) -> int:
        """First tokens that stay, by default or as given."""
        return int(self._unless_given("sink_tokens")) if self.sink_tokens is None else self.sink_tokens

    @property
    def capped(self) -> bool:
        """Whether a cap is given, which takes the place of the indexer's."""
        return self.cap_tokens is not None or self.cap_fraction is not None

    @property
    def filled(self) -> bool:
        """Whether a least share is given, which takes the place of the indexer's."""
        return self.least_tokens is not None or self.least_fraction is not None

    @property
    def indexed(self) -> bool:
        """Whether an indexer chooses, trained or synthetic."""
        return self.indexer not in (ATTENTION, OLDER_ATTENTION, HINDSIGHT, LANDMARK)

    @property
    def budgeted(self) -> bool:
        """Whether a budget decides, not a threshold."""
        return self.budget_tokens is not None or self.effective_fraction is not None

    @property
    def effective_fraction(self) -> float | None:
        """The budget as a fraction of the prompt, by default or as given; None: no such budget."""
        if self.indexer == LANDMARK and self.budget_tokens is None and self.budget_fraction is None:
            return LANDMARK_BUDGET_FRACTION
        return self.budget_fraction
