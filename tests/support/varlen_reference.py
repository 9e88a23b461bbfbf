"""What :func:`qwen2vl_trt.varlen.flash_attention` computes, on any device and type: PyTorch's kernel needs a GPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flash_attention(q, k, v, cu_seqlens, max_seqlen, causal=False, lengths=None):
    """Queries to keys, by rows or packed; refuses what the CUDA kernel refuses."""
    assert all(t.stride(-1) == 1 for t in (q, k, v))
    if cu_seqlens is None:
        assert max_seqlen == (q.shape[1], k.shape[1])
        assert lengths is None
        rows = [torch.arange(len(t) + 1, dtype=torch.int32) * t.shape[1] for t in (q, k)]
        return _attend(*(t.flatten(0, 1) for t in (q, k, v)), *rows, *max_seqlen, causal, None).view(q.shape)
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in cu_seqlens)
    assert lengths is None or lengths.dtype == torch.int32
    return _attend(q, k, v, *cu_seqlens, *max_seqlen, causal, lengths)


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
) -> Tensor:
    """One operator, as the kernel is one: what it looks at inside holds nobody up."""
    assert query.shape[1] % key.shape[1] == 0
    assert int(bounds_q[0]) == int(bounds_k[0]) == 0
    assert int(bounds_q[-1]) == len(query), "the kernel would leave tokens out"
    out = torch.full_like(query, torch.nan)
    for row in range(len(bounds_q) - 1):
        queries = slice(int(bounds_q[row]), int(bounds_q[row + 1]))
        first = int(bounds_k[row])
        count = int(bounds_k[row + 1]) - first if lengths is None else int(lengths[row])
        asked = queries.stop - queries.start
        assert asked <= longest_q
        assert 0 < count <= longest_k
        keys = slice(first, first + count)
        q, k, v = (t.transpose(0, 1) for t in (query[queries], key[keys], value[keys]))
        mask = torch.ones(asked, count, dtype=torch.bool).tril(count - asked) if causal else None
        out[queries] = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(0, 1)
    return out
