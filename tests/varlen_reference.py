"""What ``torch.nn.attention.varlen.varlen_attn`` computes, on any device and type: stands in for it on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1), enable_gqa=False, seqused_k=None
):
    """``[T_q, H, D]`` over keys ``[T_k, Hkv, D]``; refuses what the CUDA kernels refuse."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert window_size == (-1, -1)
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert all(t.stride(-1) == 1 for t in (query, key, value))
    return _attend(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, enable_gqa, seqused_k)


@torch.library.custom_op("qwen2vl_trt_tests::varlen", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    enable_gqa: bool,
    seqused_k: Tensor | None,
) -> Tensor:
    """One operator, as the kernel is one: what it looks at inside holds nobody up."""
    assert int(cu_seq_q[0]) == int(cu_seq_k[0]) == 0
    assert int(cu_seq_q[-1]) == len(query), "the kernel would leave tokens out"
    out = torch.full_like(query, torch.nan)
    for row in range(len(cu_seq_q) - 1):
        queries = slice(int(cu_seq_q[row]), int(cu_seq_q[row + 1]))
        first = int(cu_seq_k[row])
        count = int(cu_seq_k[row + 1]) - first if seqused_k is None else int(seqused_k[row])
        assert queries.stop - queries.start <= max_q
        assert 0 < count <= max_k
        keys = slice(first, first + count)
        q, k, v = (t.transpose(0, 1) for t in (query[queries], key[keys], value[keys]))
        out[queries] = F.scaled_dot_product_attention(q, k, v, enable_gqa=enable_gqa).transpose(0, 1)
    return out


def varlen_attn_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
    """The signature of PyTorch 2.10, which cannot read a cache."""
    assert not is_causal
    return varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
