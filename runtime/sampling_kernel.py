"""A Triton kernel that samples from logits, one program a row: penalties, mask, filters and draw in one launch.

:mod:`~qwen2vl_trt.runtime.triton_sampler` launches it. The thresholds of top-k and top-p are found without a sort, by
the search of FlashInfer's ``TopKMaskLogitsKernel`` and ``TopPRenormProbKernel`` (Ye et al., 2025): pivots divide an
interval of scores, whose ends move to scores that there are. Here there are four pivots a pass, and ties are kept or
dropped together.

Weights are whole numbers, :data:`UNIT` of the likeliest token: their sums are exact, whatever the order, so that the
threshold, the total and the draw cannot disagree. Tokens of less than one have no weight, which is together at most
V / UNIT of a row's probability, 1e-8 of a vocabulary of 151,936.

Passes over a row of V scores of 4 bytes, besides a copy where there are penalties: 1 to mask and divide, which writes
too; for top-k 3 to 10, for top-p one more than 1 to 12 (of 151,936 normally distributed scores; at most some 150 where
each is half of the one before); 2 to draw. With top-k of 20 and top-p of 0.8 that is about 13 passes, which read 8 MB a
row of 151,936; the scores of a call, 0.6 MB a row, may stay in a GPU's L2 cache. The host is not asked, so that a CUDA
graph can capture it.

Imported only where Triton is installed; under ``TRITON_INTERPRET=1`` tests run it on the CPU.
"""

# ruff: noqa: N803 - in Triton, compile-time constants are written in capitals
# Kernel arguments have no Python types.
# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl

UNIT = tl.constexpr(2.0**44)

# Fields of a row of settings, in elements of their own size (sampler.Rows).
WORDS = tl.constexpr(8)
SLOT, SEEN, TOP_K = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # INT64
UNIFORM, TOP_P = tl.constexpr(3), tl.constexpr(4)  # FP64
REPETITION, REPETITION_SQUARED = tl.constexpr(10), tl.constexpr(11)  # FP32, as all that follow
PRESENCE, FREQUENCY = tl.constexpr(12), tl.constexpr(13)
TEMPERATURE, LOG_MIN_P = tl.constexpr(14), tl.constexpr(15)

OFF = tl.constexpr(float("-inf"))  # below every score
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _weights(scores, best):
    return (tl.exp(scores - best) * UNIT).to(tl.int64)


@triton.jit
def _block(scores, start, threshold, best, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Weights of BLOCK scores, 0 of those below the threshold."""
    lanes = start + tl.arange(0, BLOCK)
    score = tl.load(scores + lanes, mask=lanes < VOCAB, other=OFF)
    return tl.where(score >= threshold, _weights(score, best), 0)


@triton.jit
def _total(scores, threshold, best, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int64)
    for start in range(0, VOCAB, BLOCK):
        total += _block(scores, start, threshold, best, VOCAB, BLOCK)
    return tl.sum(total, axis=0)


@triton.jit
def _threshold(scores, low, best, needed, WEIGHED: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The largest score such that those at or above it are as many as needed, or weigh as much.

    It is at least ``low``, which is finite. A pass moves ``low`` up to a pivot or ``high``, which is one of the scores,
    down to the next below a pivot.
    """
    high = best
    share = (tl.arange(0, 4) + 1) / 4.0
    while low < high:
        pivot = low * (1 - share) + high * share
        pivot = tl.where((pivot > low) & (pivot < high), pivot, high)
        reached = tl.zeros([4, BLOCK], tl.int64)
        below = tl.full([4, BLOCK], OFF, tl.float32)
        for start in range(0, VOCAB, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            score = tl.load(scores + lanes, mask=lanes < VOCAB, other=OFF)[None, :]
            inside = score >= pivot[:, None]
            if WEIGHED:
                reached += tl.where(inside, _weights(score, best), 0)
            else:
                reached += inside.to(tl.int64)
            below = tl.maximum(below, tl.where(inside, OFF, score))
        enough = tl.sum(reached, axis=1) >= needed
        low = tl.maximum(low, tl.max(tl.where(enough, pivot, OFF), axis=0))
        high = tl.minimum(high, tl.min(tl.where(enough, INFINITY, tl.max(below, axis=1)), axis=0))
    return high


@triton.jit(do_not_specialize=["capacity", "candidates", "penalised", "counted", "masked"])
def sample(
    logits,
    source,
    scores,
    table,
    doubles,
    floats,
    seen,
    counts,
    allowed,
    tokens,
    totals,
    capacity,
    candidates,
    penalised,
    counted,
    masked,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Draw a row's token, and note it among its seen tokens and their counts.

    Args:
        logits: ``[B, V]`` FP32, not changed.
        source: ``scores`` if a row is ``penalised``, else ``logits``.
        scores: ``[B, V]`` FP32, to work in.
        table: ``[B, 8]`` INT64, of ``Sampler.stage``; ``doubles`` and ``floats`` are views of it.
        seen: ``[slots, capacity]`` INT64 ids.
        counts: ``[slots, V]`` FP32, if ``counted``.
        allowed: ``[B, ceil(V / 32)]`` INT32, if ``masked``.
        tokens: ``[B]`` INT64, written.
        totals: ``[B]`` FP32, written; NaN where a row is broken.
        candidates: the rank that means no top-k.
    """
    tl.static_assert(VOCAB < 2**19, "sums of weights must fit 63 bits")
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    source += row * VOCAB
    scores += row * VOCAB
    allowed += row * ((VOCAB + 31) // 32)
    table += row * WORDS
    doubles += row * WORDS
    floats += row * 2 * WORDS
    slot = tl.load(table + SLOT)
    number = tl.load(table + SEEN)
    seen += slot * capacity
    counts += slot * VOCAB

    if penalised:
        for start in range(0, VOCAB, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            inside = lanes < VOCAB
            tl.store(scores + lanes, tl.load(logits + lanes, mask=inside), mask=inside)
        tl.debug_barrier()
        for start in range(0, number, BLOCK):
            lanes = start + tl.arange(0, BLOCK)
            inside = lanes < number
            ids = tl.load(seen + lanes, mask=inside, other=0)
            score = tl.div_rn(tl.load(logits + ids, mask=inside, other=0.0), tl.load(floats + REPETITION))
            score = tl.where(score > 0, score, score * tl.load(floats + REPETITION_SQUARED))
            count = tl.load(counts + ids, mask=inside & (ids < counted), other=0.0)
            score = score - count * tl.load(floats + FREQUENCY)
            score = score - tl.minimum(count, 1.0) * tl.load(floats + PRESENCE)
            tl.store(scores + ids, score, mask=inside)
        tl.debug_barrier()

    temperature = tl.load(floats + TEMPERATURE)
    most = tl.full([BLOCK], OFF, tl.float32)
    least = tl.full([BLOCK], INFINITY, tl.float32)
    broken = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        lanes = start + tl.arange(0, BLOCK)
        inside = lanes < VOCAB
        score = tl.load(source + lanes, mask=inside, other=OFF)
        bits = tl.load(allowed + lanes // 32, mask=lanes < masked, other=-1)
        score = tl.where((bits >> lanes % 32) & 1 != 0, tl.div_rn(score, temperature), OFF)
        tl.store(scores + lanes, score, mask=inside)
        most = tl.maximum(most, score)
        least = tl.minimum(least, tl.where(score > OFF, score, INFINITY))
        broken |= (score != score).to(tl.int32)
    tl.debug_barrier()  # the passes below read what other threads wrote

    best = tl.max(most, axis=0)
    low = tl.min(least, axis=0)
    token = row * 0
    total = best * float("nan")
    if (tl.max(broken, axis=0) == 0) & (best > OFF) & (best < INFINITY):
        rank = tl.load(table + TOP_K)
        if (rank < candidates) & (rank >= 0):
            low = _threshold(scores, low, best, rank + 1, False, VOCAB, BLOCK)
        top_p = tl.load(doubles + TOP_P)
        if top_p < 1:
            needed = tl.ceil(top_p * _total(scores, low, best, VOCAB, BLOCK).to(tl.float64)).to(tl.int64)
            low = tl.maximum(low, best - 31)  # below it nothing weighs
            low = _threshold(scores, low, best, needed, True, VOCAB, BLOCK)
        low = tl.maximum(low, best + tl.load(floats + LOG_MIN_P))
        whole = _total(scores, low, best, VOCAB, BLOCK)
        # Below the total, as numbers have 52 bits.
        drawn = (tl.load(doubles + UNIFORM) * whole.to(tl.float64)).to(tl.int64)
        passed = row * 0  # weight of the blocks before the token's
        first = row * 0
        running = row * 0
        for start in range(0, VOCAB, BLOCK):
            running += tl.sum(_block(scores, start, low, best, VOCAB, BLOCK), axis=0)
            before = running <= drawn
            first += tl.where(before, BLOCK, 0)
            passed = tl.where(before, running, passed)
        cumulative = passed + tl.cumsum(_block(scores, first, low, best, VOCAB, BLOCK), axis=0)
        token = first + tl.sum((cumulative <= drawn).to(tl.int64), axis=0)
        total = whole.to(tl.float32)
    tl.store(tokens + row, token)
    tl.store(totals + row, total)
    if penalised:
        tl.store(seen + number, token)
    if counted:
        tl.store(counts + token, tl.load(counts + token) + 1)
