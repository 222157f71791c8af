"""In which bits a store keeps K and V, and what a packed page takes. No torch.

A packed page holds P tokens of one KV head. Keys are quantised per channel over a group of its tokens, values per token
over a group of channels (KIVI, arXiv 2402.02750). The newest tokens stay at the model's precision: the residual.

Shapes: P tokens a page, D head size, F elements a byte (the fields of a byte).
"""

from dataclasses import dataclass
from typing import Literal

KvName = Literal["fp8", "int8", "int4", "kivi2"]

RESIDUAL_TOKENS = 64
"""Newest tokens that are never packed; the pages that hold them and one page more are the residual."""
_RECORD_ALIGNMENT = 32  # halves of a record are what the kernel that recalls moves, 16 bytes at a time
_META_BYTES = 2  # scales and bases are fp16


@dataclass(frozen=True)
class KvFormat:
    """One format.

    Attributes:
        name: as ``kv=`` gives it.
        bits: of an element.
        is_float: e4m3 with a scale; else whole numbers with a scale and a base.
        most_key_tokens: most tokens that share a channel's scale; None: those of a page.
    """

    name: KvName
    bits: int
    is_float: bool = False
    most_key_tokens: int | None = None

    @property
    def fields(self) -> int:
        """F: elements in a byte. A token's channels fall into as many groups, each with a scale of its own."""
        return 8 // self.bits

    @property
    def places(self) -> tuple[int, ...]:
        """What a code counts for in its byte, by field."""
        return tuple(2 ** (self.bits * field) for field in range(self.fields))

    @property
    def numbers(self) -> int:
        """Numbers a group keeps beside its elements: a scale and, for whole numbers, a base."""
        return 1 if self.is_float else 2

    def key_group_tokens(self, page_tokens: int) -> int:
        """Return the tokens that share a channel's scale: those of a page, or as many as divide it."""
        most = self.most_key_tokens
        return page_tokens if most is None or page_tokens % most else most


FORMATS: dict[str, KvFormat] = {
    "fp8": KvFormat("fp8", 8, is_float=True),
    "int8": KvFormat("int8", 8),
    "int4": KvFormat("int4", 4),
    "kivi2": KvFormat("kivi2", 2, most_key_tokens=32),
}


@dataclass(frozen=True)
class PagePacking:
    """How one KV head's part of a page lies in memory: a record of bytes.

    In order: elements of K [P, D/F], elements of V [P, D/F], then in fp16 K's scales (and bases)
    [groups, numbers, D] and V's [numbers, F, P]. Bits i of byte j hold channel ``i * D/F + j``. K's numbers are in the
    order of ``channel_order``: that of the fields of words of two bytes, in which a kernel reads.

    Attributes:
        format: of the elements.
        page_tokens: P.
        head_dim: D.
    """

    format: KvFormat
    page_tokens: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's elements of K, and of V: D/F."""
        return self.head_dim // self.format.fields

    @property
    def key_group_tokens(self) -> int:
        """Tokens that share a channel's scale."""
        return self.format.key_group_tokens(self.page_tokens)

    @property
    def key_groups(self) -> int:
        """Groups of tokens in a page."""
        return self.page_tokens // self.key_group_tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of the elements of K, and of V."""
        return self.page_tokens * self.token_bytes

    @property
    def key_numbers(self) -> int:
        """Scales and bases of K."""
        return self.key_groups * self.format.numbers * self.head_dim

    @property
    def value_numbers(self) -> int:
        """Scales and bases of V."""
        return self.format.fields * self.format.numbers * self.page_tokens

    @property
    def channel_order(self) -> tuple[int, ...]:
        """The channels by field of a word: field f of word m holds channel ``f % F * D/F + f // F + 2 m``."""
        F, size = self.format.fields, self.token_bytes
        return tuple(f % F * size + f // F + 2 * m for f in range(2 * F) for m in range(size // 2))

    @property
    def record_bytes(self) -> int:
        """Bytes of the record, rounded up to whole pieces of 32."""
        held = 2 * self.element_bytes + _META_BYTES * (self.key_numbers + self.value_numbers)
        return -(-held // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT

    def unsupported(self) -> list[str]:
        """Return every reason why pages cannot be packed so."""
        if self.head_dim % (2 * self.format.fields):
            return [
                f"kv={self.format.name} puts {2 * self.format.fields} channels into a word of two bytes, and heads "
                f"have {self.head_dim}"
            ]
        return []


def residual_pages(page_tokens: int) -> int:
    """Return the pages of a store that are never packed: those of ``RESIDUAL_TOKENS``, and the one being filled."""
    return -(-RESIDUAL_TOKENS // page_tokens) + 1
