"""Which labels are asked of a collection, and which tokens of a prompt stay whatever is chosen."""

from dataclasses import dataclass

from kvscope.harness.indexers.collection.document import CollectionInfo, Document
from kvscope.harness.indexers.collection.label_rule import LabelRule
from kvscope.methods.budget import default_recency_tokens
from kvscope.methods.lsa.labels import Voters
from kvscope.methods.lsa.layout import ChunkLayout


@dataclass(frozen=True, kw_only=True)
class LabelChoice:
    """How positives are told in training, evaluation and calibration alike.

    Attributes:
        top_p, voters, votes, least_mass, label_layers: in place of the collection's own, see ``LabelRule``; None: as it
            says.
        sink_tokens, recency_tokens: what always stays, so that it is neither positive nor negative; None: as in the
            method.
    """

    top_p: float | None = None
    voters: Voters | None = None
    votes: int | None = None
    least_mass: float | None = None
    label_layers: tuple[int, ...] | None = None
    sink_tokens: int = 4
    recency_tokens: int | None = None

    def rule(self, info: CollectionInfo) -> LabelRule:
        """Return how positives of a collection are told.

        Raises:
            UsageError: a rule that the collection cannot answer.
        """
        return info.rule(
            top_p=self.top_p,
            voters=self.voters,
            votes=self.votes,
            least_mass=self.least_mass,
            layers=self.label_layers,
        )

    def layout(self, document: Document, chunk_tokens: int) -> ChunkLayout:
        """Return what of a document's prompt always stays, and which chunks are candidates."""
        n_tokens = document.info.prompt_tokens
        return ChunkLayout(
            n_tokens=n_tokens,
            chunk_tokens=chunk_tokens,
            sink_tokens=self.sink_tokens,
            recency_tokens=default_recency_tokens(n_tokens) if self.recency_tokens is None else self.recency_tokens,
        )
