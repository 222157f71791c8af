"""A prompt's host pages in few bits, for methods that recall, and how much is packed at once.

Shapes: S pages, H KV heads, P tokens a page, D head size, R bytes a record.
"""

import torch

from kvscope.methods.kv_format import PagePacking
from kvscope.methods.packing import pack_pages
from kvscope.methods.pinned import empty_pinned
from kvscope.methods.store import PromptKV

#: Raw bytes on the device at once while a prompt is packed: packing takes seven to nine times as many beside them, as
#: the driver sees. Large layers are packed in this many parts instead, or launches would take long.
_RAW_BYTES_AT_ONCE, _PARTS_OF_A_LAYER = 1 << 20, 64


def pages_at_once(n_pages: int, page_bytes: int) -> int:
    """Return how many raw pages of a layer are on the device together while they are packed."""
    return max(_RAW_BYTES_AT_ONCE // page_bytes, n_pages // _PARTS_OF_A_LAYER, 1)


def packed_mirror(prompt: PromptKV, packing: PagePacking, device: torch.device) -> dict[int, torch.Tensor]:
    """Return the prompt's host pages packed, for methods that recall: layer -> [pages, H, 2, 1, R / 2] in host memory.

    A record is cut in halves where raw pages have K and V, so that what moves raw pages moves these. Whole prompts are
    packed, the unused end of the last page too; on a GPU it packs, block by block.

    Args:
        packing: its page is the unit of recall, and divides the prompt's pages.
    """
    found = prompt.packed.get(packing)
    if found is None:
        found = {layer: _packed_layer(pages, packing, device) for layer, pages in prompt.pages.items()}
        prompt.packed[packing] = found
    return found


def _packed_layer(raw: torch.Tensor, packing: PagePacking, device: torch.device) -> torch.Tensor:
    S, H, _, P, D = raw.shape
    parts, unit = P // packing.page_tokens, packing.page_tokens
    size = (S * parts, H, 2, 1, packing.record_bytes // 2)
    packed = empty_pinned(size, dtype=torch.uint8) if raw.is_pinned() else torch.empty(size, dtype=torch.uint8)
    at_once = pages_at_once(S, H * 2 * P * D * raw.itemsize)
    for first in range(0, S, at_once):
        block = raw[first : first + at_once].to(device)
        units = block.view(-1, H, 2, parts, unit, D).permute(0, 3, 1, 2, 4, 5)
        records = pack_pages(units, packing).view(-1, *size[1:])
        packed[first * parts : first * parts + len(records)] = records.cpu()
    return packed
