"""Packs pages of K and V into fewer bits and unpacks them, in torch: on the host, on a GPU, and for the tests.

A group of b bits keeps a scale s and a base a, both fp16, and of each element a code c. In a byte, field f holds c at
bit b f, and what is read is ``c 2^(b f) s + a``: the byte as a number, masked to the field, so that nothing is shifted.
a is the group's least value, rounded down, and s is chosen so that the greatest is no more than ``2^b - 1`` steps of
``2^(b f) s`` above a. Codes are computed from s and a as they are stored: no element is off by more than half a step.
fp8 keeps ``e4m3(x / s)``, ``s = max |x| / 448``.

Shapes: X any leading sizes, P tokens a page, D head size, F fields of a byte, R bytes of a record; ``kv_format`` has
the layout of a record.
"""

import torch

from kvscope.methods.fp8_keys import FP8_MAX, KEY_DTYPE
from kvscope.methods.kv_format import PagePacking

_TINY = 2.0**-24  # the least fp16 above zero: the spacing of fp16 near zero
_LOOSE = 2.0**-10  # twice fp16's rounding


def pack_pages(pages: torch.Tensor, packing: PagePacking) -> torch.Tensor:
    """Return pages [X, 2, P, D] as records [X, R] of uint8, on the device they are on."""
    D, P = packing.head_dim, packing.page_tokens
    fields, groups = packing.format.fields, packing.key_groups
    lead = pages.shape[:-3]
    k_ngTD = pages[..., 0, :, :].reshape(-1, groups, P // groups, D).double()
    v_nPFC = pages[..., 1, :, :].reshape(-1, P, fields, D // fields).double()
    places_F = torch.tensor(packing.format.places, dtype=torch.float64, device=pages.device)
    k_codes, k_numbers = _quantise(k_ngTD, packing, dim=2, places=places_F.repeat_interleave(D // fields))
    v_codes, v_numbers = _quantise(v_nPFC, packing, dim=3, places=places_F[:, None])
    n = len(k_codes)
    record = torch.zeros((n, packing.record_bytes), dtype=torch.uint8, device=pages.device)
    size, at = packing.element_bytes, 2 * packing.element_bytes
    record[:, :size] = _fold(k_codes.view(n, P, fields, D // fields)).flatten(1)
    record[:, size:at] = _fold(v_codes).flatten(1)
    order_D = torch.tensor(packing.channel_order, device=pages.device)
    k_meta = torch.stack([each.view(n, groups, D) for each in k_numbers], 2)[..., order_D]  # [n, groups, numbers, D]
    v_meta = torch.stack([each.view(n, P, fields).transpose(1, 2) for each in v_numbers], 1)  # [n, numbers, F, P]
    meta = torch.cat([k_meta.flatten(1), v_meta.flatten(1)], 1).contiguous().view(torch.uint8)
    record[:, at : at + meta.shape[1]] = meta
    return record.view(*lead, packing.record_bytes)


def unpack_pages(records: torch.Tensor, packing: PagePacking, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Undo ``pack_pages`` up to rounding: return pages [X, 2, P, D]. Computed in fp32, or fp64 for ``dtype`` fp64."""
    fields, D, P, groups = packing.format.fields, packing.head_dim, packing.page_tokens, packing.key_groups
    lead, work = records.shape[:-1], torch.float64 if dtype == torch.float64 else torch.float32
    flat = records.reshape(-1, packing.record_bytes)
    n, size = len(flat), packing.element_bytes
    k_numbers, v_numbers = _numbers(flat, packing, work)
    k = _values(flat[:, :size].reshape(n, groups, P // groups, D // fields), packing, work)  # [n, groups, T, F, D/F]
    v = _values(flat[:, size : 2 * size].reshape(n, P, D // fields), packing, work)  # [n, P, F, D/F]
    k_per_channel = k_numbers.view(n, groups, packing.format.numbers, 1, fields, D // fields)
    v_per_token = v_numbers.transpose(1, 2)[..., None]  # [n, P, F, numbers, 1]
    k, v = (
        _scaled(codes, numbers, packing, work)
        for codes, numbers in ((k, k_per_channel.unbind(2)), (v, v_per_token.unbind(3)))
    )
    return torch.stack([k.reshape(n, P, D), v.reshape(n, P, D)], 1).view(*lead, 2, P, D).to(dtype)


def unpack_tokens(
    records: torch.Tensor, packing: PagePacking, *, page_HT: torch.Tensor, offset_HT: torch.Tensor
) -> torch.Tensor:
    """Return single tokens of packed pages [S, H, R]: K and V of each KV head's, [2, H, T, D] in fp32.

    Args:
        page_HT, offset_HT: a token's page and its place in it, int64.
    """
    fields, D = packing.format.fields, packing.head_dim
    S, H, R = records.shape
    size, C = packing.element_bytes, packing.token_bytes
    head_H1 = torch.arange(H, device=records.device)[:, None]
    k_numbers, v_numbers = (each.view(S, H, *each.shape[1:]) for each in _raw_numbers(records.view(-1, R), packing))
    elements = records[:, :, : 2 * size].view(S, H, 2, packing.page_tokens, C)
    k, v = (
        _values(elements[page_HT, head_H1, kind, offset_HT], packing, torch.float32) for kind in (0, 1)
    )  # [H, T, F, D/F]
    k_meta = k_numbers[page_HT, head_H1, offset_HT // packing.key_group_tokens].float()  # [H, T, numbers, D]
    k_meta = k_meta.view(*page_HT.shape, -1, fields, C)
    v_meta = v_numbers[page_HT, head_H1, :, offset_HT].float()[..., None]  # [H, T, F, numbers, 1]
    k, v = (
        _scaled(codes, numbers, packing, torch.float32)
        for codes, numbers in ((k, k_meta.unbind(2)), (v, v_meta.unbind(3)))
    )
    return torch.stack([k.flatten(2), v.flatten(2)]).view(2, *page_HT.shape, D)


def _quantise(
    x: torch.Tensor, packing: PagePacking, *, dim: int, places: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return codes (uint8, as ``x``) and the numbers of each group, which lies along ``dim``.

    In fp64: a base is as large as many steps, and is taken away from elements of its size.
    """
    if packing.format.is_float:
        scale = _above(x.abs().amax(dim, keepdim=True) / FP8_MAX)
        scaled = x / scale.double().clamp_min(_TINY)
        return scaled.float().to(KEY_DTYPE).view(torch.uint8), [scale]
    levels = 2**packing.format.bits - 1
    low, high = torch.aminmax(x, dim=dim, keepdim=True)
    base = _below(low)
    scale = _above((high - base.double()) / (levels * places))
    step = scale.double().clamp_min(_TINY) * places
    codes = ((x - base.double()) / step).round_().clamp_(0, levels)
    return codes.to(torch.uint8), [scale, base]


def _below(x: torch.Tensor) -> torch.Tensor:
    """Return the fp16 at or a little below ``x`` in fp64."""
    near = x.half()
    return torch.where(near.double() > x, (x - x.abs() * _LOOSE - _TINY).half(), near)


def _above(x: torch.Tensor) -> torch.Tensor:
    return -_below(-x)


def _fold(codes: torch.Tensor) -> torch.Tensor:
    """Put the fields of the last dimension but one, [..., F, D/F], into bytes [..., D/F]."""
    fields = codes.shape[-2]
    bits = 8 // fields
    folded = codes[..., 0, :].clone()
    for field in range(1, fields):
        folded |= codes[..., field, :] << (bits * field)
    return folded


def _values(elements: torch.Tensor, packing: PagePacking, work: torch.dtype) -> torch.Tensor:
    """Return what bytes [..., D/F] hold, [..., F, D/F]: the byte masked to each field, or e4m3."""
    if packing.format.is_float:
        return elements.view(KEY_DTYPE).to(work)[..., None, :]
    bits, fields = packing.format.bits, packing.format.fields
    if fields == 1:
        return elements.to(work)[..., None, :]
    parts = [elements & ((2**bits - 1) << (bits * field)) for field in range(fields)]
    return torch.stack(parts, -2).to(work)


def _scaled(
    codes: torch.Tensor, numbers: tuple[torch.Tensor, ...], packing: PagePacking, work: torch.dtype
) -> torch.Tensor:
    """Return what fields stand for, by their groups' numbers, in ``work``."""
    return codes * numbers[0] if packing.format.is_float else codes * numbers[0].to(work) + numbers[1].to(work)


def _raw_numbers(flat: torch.Tensor, packing: PagePacking) -> tuple[torch.Tensor, torch.Tensor]:
    """Return K's numbers [n, groups, numbers, D] and V's [n, F, P, numbers] of records [n, R], in fp16."""
    n, numbers = len(flat), packing.format.numbers
    halves = flat.view(torch.float16)
    at = packing.element_bytes  # two blocks of elements, two bytes a number
    k = halves[:, at : at + packing.key_numbers].view(n, packing.key_groups, numbers, packing.head_dim)
    at += packing.key_numbers
    v = halves[:, at : at + packing.value_numbers].view(n, numbers, packing.format.fields, packing.page_tokens)
    v = v.permute(0, 2, 3, 1)
    place_D = torch.tensor(packing.channel_order, device=flat.device).argsort()
    return k[..., place_D], v


def _numbers(flat: torch.Tensor, packing: PagePacking, work: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    k, v = _raw_numbers(flat, packing)
    return k.to(work), v.to(work)
