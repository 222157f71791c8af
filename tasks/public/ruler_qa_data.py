"""What RULER's question answering is made of: questions, and the documents of all of them, from SQuAD or HotpotQA."""

from collections.abc import Callable, Mapping
from typing import Annotated, ClassVar, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from kvscope.errors import UsageError, shown
from kvscope.tasks.public.records import Record, benchmark_records


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("a text of white space alone, which would be found in any answer")
    return text


AnswerText = Annotated[str, AfterValidator(_not_blank)]
MaybeEmpty = Annotated[str, Field(min_length=0)]


class Question(NamedTuple):
    """A question. Documents are indices into those of the file.

    Attributes:
        text: the question.
        answers: every accepted wording.
        own: the documents that always stand in its prompt.
        article: documents of the same article, which are taken before others; its own may be among them.
        evidence: those of its own that the answer needs, as far as the file says.
    """

    text: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    article: tuple[int, ...] = ()
    evidence: tuple[int, ...] = ()


class Corpus(NamedTuple):
    """Questions in the order of their file, every document of it once, and the file's SHA-256."""

    questions: tuple[Question, ...]
    documents: tuple[str, ...]
    sha256: str


class SquadAnswer(Record):
    """One accepted wording."""

    text: AnswerText


class SquadQuestion(Record):
    """A question about a paragraph; one that is impossible has no answer, and is not asked."""

    id: str
    question: str
    answers: tuple[SquadAnswer, ...]
    is_impossible: bool = False

    @model_validator(mode="after")
    def _can_be_scored(self) -> "SquadQuestion":
        if not self.is_impossible and not self.answers:
            raise ValueError("answers is empty, and is_impossible is not true")
        return self


class SquadParagraph(Record):
    """A paragraph, which is a document, and the questions about it."""

    context: str
    qas: tuple[SquadQuestion, ...]


class SquadArticle(Record):
    """An article of SQuAD, a record of its list ``data``."""

    what: ClassVar[str] = "article"

    paragraphs: tuple[SquadParagraph, ...] = Field(min_length=1)


class HotpotQuestion(Record):
    """A question of HotpotQA (distractor): its ten documents are paragraphs of Wikipedia, as title and sentences."""

    id: str | None = Field(default=None, alias="_id")
    question: str
    answer: AnswerText
    context: tuple[tuple[str, tuple[MaybeEmpty, ...]], ...] = Field(min_length=1)
    supporting_facts: tuple[tuple[str, int], ...] = ()

    @property
    def identity(self) -> str | None:
        """The dataset's ``_id``."""
        return self.id

    @property
    def documents(self) -> dict[str, str]:
        """Return document -> title, in the order of the file."""
        return {f"{title}\n{''.join(sentences)}": title for title, sentences in self.context}


def squad(name: str, data: str | None) -> Corpus:
    """Read a file of SQuAD 2.0's form.

    Raises:
        UsageError: as ``benchmark_records``, or a question that is there twice.
    """
    articles, sha256 = benchmark_records(name, data, SquadArticle, wrapped="data")
    documents = sorted({paragraph.context for article in articles for paragraph in article.paragraphs})
    place = {document: index for index, document in enumerate(documents)}
    questions, numbers = list[Question](), dict[str, int]()
    for number, article in enumerate(articles, start=1):
        whole = tuple(dict.fromkeys(place[paragraph.context] for paragraph in article.paragraphs))
        for paragraph in article.paragraphs:
            own = (place[paragraph.context],)
            for asked in paragraph.qas:
                if asked.id in numbers:
                    raise UsageError(
                        f"Records {numbers[asked.id]} and {number} of {name} ask one question, {shown(asked.id)}, "
                        "which would count twice: give each once."
                    )
                numbers[asked.id] = number
                if not asked.is_impossible:
                    answers = tuple(answer.text for answer in asked.answers)
                    questions.append(Question(asked.question, answers, own, whole, own))
    return Corpus(tuple(questions), tuple(documents), sha256)


def hotpot(name: str, data: str | None) -> Corpus:
    """Read a file of the form of HotpotQA's distractor setting.

    Raises:
        UsageError: as ``benchmark_records``.
    """
    records, sha256 = benchmark_records(name, data, HotpotQuestion)
    documents = sorted({document for record in records for document in record.documents})
    place = {document: index for index, document in enumerate(documents)}
    questions = []
    for record in records:
        needed = {title for title, _ in record.supporting_facts}
        own = tuple(place[document] for document in record.documents)
        evidence = tuple(place[document] for document, title in record.documents.items() if title in needed)
        questions.append(Question(record.question, (record.answer,), own, (), evidence))
    return Corpus(tuple(questions), tuple(documents), sha256)


READERS: Mapping[str, Callable[[str, str | None], Corpus]] = {"ruler_qa_squad": squad, "ruler_qa_hotpot": hotpot}
