"""Storage in which the heads of a layer hold unequal numbers of tokens, and all that they do not hold is free memory.

A page here belongs to one KV head, [1, 2, P, D]; every head has a table of its own. To attention the heads of a layer
are sequences of one KV head each, which share a tensor of pages.

Shapes: H KV heads, G query heads a KV head, S pages of one head, P tokens a page, W pages of a table, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from kvscope.methods.attention import Partial, kernel_runs, merge_partials
from kvscope.methods.base import AttentionCall, SequenceCache
from kvscope.methods.gather import token_partial
from kvscope.methods.kernels.paged_decode.inputs import PagedKV
from kvscope.methods.shape import Footprint, ModelShape, tensor_bytes
from kvscope.methods.store import PromptKV


def most_pages(shape: ModelShape, head_tokens: int) -> int:
    """Return the pages of one head that always hold a layer's tokens, however its heads share them.

    Each head's last page may hold one token alone. So there is less room to spare than a page for each head.

    Args:
        head_tokens: of a KV head, mean over the layer's heads; each head holds one at least.
    """
    H = shape.n_kv_heads
    return (H * head_tokens - H) // shape.page_tokens + H if head_tokens else 0


def heads_footprint(shape: ModelShape, *, n_pages: int, head_tokens: int, table_pages: int) -> Footprint:
    """Return the footprint of the managed layers.

    Args:
        n_pages: pages of one head, in each layer.
        head_tokens: tokens of a KV head, mean over the heads.
        table_pages: most pages one head's table names.
    """
    n_layers, H = len(shape.layers), shape.n_kv_heads
    return Footprint(
        kv_bytes=n_layers * n_pages * shape.page_tokens * shape.layer_bytes_per_token // H,
        metadata_bytes=n_layers * H * (table_pages + 1) * 4,
        bytes_read_per_step=n_layers * head_tokens * shape.layer_bytes_per_token,
        attention_flops_per_step=n_layers * head_tokens * 4 * shape.n_q_heads * shape.head_dim,
    )


def heads_attention(
    call: AttentionCall, pages: torch.Tensor, *, counts_H1: torch.Tensor, table_HW: torch.Tensor
) -> torch.Tensor:
    """Attend one query to pages that each belong to one KV head; heads may hold unequal numbers of tokens.

    To the kernel the heads are sequences of one KV head, which share the tensor of pages.

    Args:
        call: as ``paged_attention``.
        pages: [S, 1, 2, P, D].
        counts_H1: tokens of each head, int32, at least one.
        table_HW: each head's pages in order, int32.
    """
    H, P, D = len(table_HW), *pages.shape[3:]
    q_HG1D = call.query.view(H, -1, 1, D)
    if kernel_runs(q_HG1D, pages):
        store = PagedKV(pages=pages, n_tokens=counts_H1, page_table=table_HW[:, None])
        from kvscope.methods.kernels.paged_decode.kernel import paged_decode  # Triton may be missing elsewhere

        out, lse = paged_decode(q_HG1D, [store], scale=call.scale, softcap=call.softcap, out_dtype=torch.float32)
        part = Partial(out[:, :, 0], lse)
    else:
        n_most = int(counts_H1.max())
        found = pages[table_HW[:, : -(-n_most // P)].long(), 0]
        k_HTD, v_HTD = (found[:, :, kind].flatten(1, 2)[:, :n_most] for kind in (0, 1))
        keep_HT = torch.arange(n_most, device=pages.device) < counts_H1
        part = token_partial(q_HG1D[:, :, 0], k_HTD, v_HTD, scale=call.scale, softcap=call.softcap, keep_HT=keep_HT)
    return merge_partials([part], call.query, sink_logits=call.sink_logits)


class HeadPool:
    """Pages of one layer, each of one head.

    Attributes:
        pages: [S, 1, 2, P, D].
        table_HW: pages of each head in order, int32; what follows a head's last page is 0 and not read.
        counts_H1: tokens each head holds, int32.
    """

    def __init__(
        self,
        prompt: PromptKV,
        layer: int,
        kept: Sequence[torch.Tensor],
        *,
        n_pages: int,
        table_pages: int,
        reserve_tokens: int,
        device: torch.device,
    ) -> None:
        """Load what each head keeps, and give each head the pages of ``reserve_tokens`` more.

        Args:
            kept: positions each head keeps, ascending, one tensor a head.
            n_pages: pages to allocate: enough for these.
            table_pages: most pages a head's table names.
        """
        shape = prompt.shape
        P, D = shape.page_tokens, shape.head_dim
        self._page_tokens = P
        self.pages = torch.zeros((n_pages, 1, 2, P, D), dtype=prompt.dtype, device=device)
        table_HW = torch.zeros((len(kept), table_pages), dtype=torch.int32)
        self._owned: list[int] = []
        host, first = prompt.pages[layer], 0
        for head, token_N in enumerate(kept):
            n_owned = shape.pages(len(token_N) + reserve_tokens)
            table_HW[head, :n_owned] = torch.arange(first, first + n_owned)
            if len(token_N):
                packed = host.new_zeros((shape.pages(len(token_N)), 1, 2, P, D))
                to = torch.arange(len(token_N))
                packed[to // P, 0, :, to % P] = host[token_N // P, head, :, token_N % P]
                self.pages[first : first + len(packed)] = packed.to(device)
            self._owned.append(n_owned)
            first += n_owned
        self.table_HW = table_HW.to(device)
        self.counts_H1 = torch.tensor([[len(each)] for each in kept], dtype=torch.int32).to(device)
        self._left_tokens = reserve_tokens

    def append(self, k_BH1D: torch.Tensor, v_BH1D: torch.Tensor) -> None:
        """Store one token behind the last of each head."""
        if self._left_tokens == 0:
            self._grow()
        self._left_tokens -= 1
        count_H = self.counts_H1[:, 0].long()
        head_H = torch.arange(len(count_H), device=count_H.device)
        page_H = self.table_HW[head_H, count_H // self._page_tokens].long()
        self.pages[page_H, 0, :, count_H % self._page_tokens] = torch.stack((k_BH1D[0, :, 0], v_BH1D[0, :, 0]), 1)
        self.counts_H1 += 1

    def _grow(self) -> None:
        """Give every head another page."""
        H, n_pages = len(self._owned), len(self.pages)
        self.pages = torch.cat([self.pages, self.pages.new_zeros((H, *self.pages.shape[1:]))])
        if max(self._owned) == self.table_HW.shape[1]:
            self.table_HW = torch.nn.functional.pad(self.table_HW, (0, 1))
        for head, n_owned in enumerate(self._owned):
            self.table_HW[head, n_owned] = n_pages + head
            self._owned[head] += 1
        self._left_tokens = self._page_tokens


class HeadSequence(SequenceCache):
    """One sequence whose heads keep unequal numbers of prompt tokens, and every decoded one."""

    def __init__(
        self,
        prompt: PromptKV,
        device: torch.device,
        *,
        kept: Mapping[int, Sequence[torch.Tensor]],
        n_pages: int,
        table_pages: int,
        reserve_tokens: int,
    ) -> None:
        """Load what is kept.

        Args:
            kept: of each managed layer the positions each head keeps; equally many of a layer in all.
            n_pages: pages of one head to allocate in each layer.
            table_pages: most pages one head's table names.
        """
        super().__init__(prompt, device)
        self._pools = {
            layer: HeadPool(
                prompt,
                layer,
                heads,
                n_pages=n_pages,
                table_pages=table_pages,
                reserve_tokens=reserve_tokens,
                device=self.shape.device_of(layer, device),
            )
            for layer, heads in kept.items()
        }
        self._lengths = dict.fromkeys(self.shape.layers, prompt.n_tokens)
        n_kept = sum(map(len, kept[self.shape.layers[0]]))
        self._n_dropped = prompt.n_tokens - n_kept // self.shape.n_kv_heads

    @property
    def n_tokens(self) -> int:
        return self._lengths[self.shape.layers[-1]]

    def static_reasons(self) -> list[str]:
        return ["the heads of a layer hold unequal numbers of tokens, which one launch for all sequences does not read"]

    def attend(self, layer: int, call: AttentionCall) -> torch.Tensor:
        pool = self._pools[layer]
        pool.append(call.key, call.value)
        self._lengths[layer] += 1
        return heads_attention(call, pool.pages, counts_H1=pool.counts_H1, table_HW=pool.table_HW)

    def managed_footprint(self) -> Footprint:
        pools = self._pools.values()
        n_layers, n_held = len(self.shape.layers), self.n_tokens - self._n_dropped
        return Footprint(
            kv_bytes=tensor_bytes(pool.pages for pool in pools),
            metadata_bytes=tensor_bytes(each for pool in pools for each in (pool.table_HW, pool.counts_H1)),
            bytes_read_per_step=n_layers * n_held * self.shape.layer_bytes_per_token,
            attention_flops_per_step=n_layers * n_held * 4 * self.shape.n_q_heads * self.shape.head_dim,
        )

    def close(self) -> None:
        self._pools.clear()
        super().close()
