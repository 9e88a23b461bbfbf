"""What :func:`qwen2vl_trt.varlen.flash_attention` computes, on any device and type: PyTorch's kernel needs a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attention(q, k, v, cu_seqlens, max_seqlen, causal=False, lengths=None, block_table=None):
    """Packed queries to packed keys or to pages; refuses what the CUDA kernel refuses."""
    assert all(t.stride(-1) == 1 for t in (q, k, v)), "the last dimension must be contiguous"
    assert q.ndim == 3
    assert k.shape == v.shape
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in cu_seqlens)
    assert len(cu_seqlens[0]) == len(cu_seqlens[1])
    if lengths is not None:
        assert lengths.dtype == torch.int32
        assert lengths.is_contiguous()
        assert lengths.shape == (len(cu_seqlens[0]) - 1,)
    if block_table is None:
        assert k.ndim == 3
    else:
        assert k.ndim == 4
        assert k.shape[1] % 256 == 0, "the page size must be divisible by 256"
        assert block_table.dtype == torch.int32
        assert block_table.stride(-1) == 1
        assert len(block_table) == len(cu_seqlens[0]) - 1
    return _attend(q, k, v, *cu_seqlens, *max_seqlen, causal, lengths, block_table)


@torch.library.custom_op("qwen2vl_trt_tests::flash_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: Tensor,
    bounds_k: Tensor,
    longest_q: int,
    longest_k: int,
    causal: bool,
    lengths: Tensor | None,
    block_table: Tensor | None,
) -> Tensor:
    """One operator, as the kernel is one: what it looks at inside holds nobody up."""
    assert query.shape[1] % key.shape[-2] == 0
    assert int(bounds_q[0]) == 0
    assert int(bounds_q[-1]) == len(query), "the kernel would leave tokens out"
    out = torch.full_like(query, torch.nan)
    for row in range(len(bounds_q) - 1):
        queries = slice(int(bounds_q[row]), int(bounds_q[row + 1]))
        asked = queries.stop - queries.start
        first = 0 if block_table is not None else int(bounds_k[row])
        count = int(bounds_k[row + 1]) - first if lengths is None else int(lengths[row])
        assert 0 <= asked <= longest_q
        assert 0 < count <= longest_k
        keys, values = key, value
        if block_table is not None:
            pages = block_table[row, : -(-count // key.shape[1])].long()
            assert 0 <= int(pages.min()) <= int(pages.max()) < len(key), "the kernel would read other memory"
            keys, values = key[pages].flatten(0, 1), value[pages].flatten(0, 1)
        q, k, v = (
            t.transpose(0, 1) for t in (query[queries], keys[first : first + count], values[first : first + count])
        )
        # Queries before the first key see none and give zeros.
        blind = max(asked - count, 0) if causal else 0
        mask = torch.ones(asked - blind, count, dtype=torch.bool).tril(count - asked + blind) if causal else None
        if asked:
            y = F.scaled_dot_product_attention(q[:, blind:], k, v, attn_mask=mask, enable_gqa=True)
            out[queries] = torch.cat([torch.zeros_like(q[:, :blind]), y], 1).transpose(0, 1)
    return out
