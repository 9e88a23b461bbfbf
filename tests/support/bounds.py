"""How far two right results may lie apart, whatever instructions computed them.

AVX2, AVX-512 and AMX add in other orders, round a product before it is added or not, and round to BF16 in other places.
A tolerance that holds on one CPU because of that is luck; these follow from the arithmetic.
"""

FP32 = 1e-5
"""Of whole models and single layers, relative to the largest number. A sum of n products is off by some
sqrt(n) * 2**-24 of it: 1e-6 for the n of up to 400 here, and measured 2e-6 through all layers. TF32 is off by 1e-3."""

FP32_BEHIND_BOTH = 5e-5
"""Of the decoder's states where the tower's embeddings went in: their difference passes through the decoder, which
magnifies it. Measured 5e-6 with the tiny model."""

BF16_STEP = 2**-7
"""From a BF16 number to the next, relative to it. Each rounding is half a step off, so two results that are rounded
once each, from sums that differ in the last bit, lie a whole step apart."""

E4M3_NOISE = 0.15
"""Of a model that rounds to FP8 between its layers, as a norm. Sums that differ in their last bit round to another E4M3
number here and there, an eighth away; that changes the sums of the next layer, where more numbers round otherwise. So
two right results may lie as far apart as rounding itself moves them, 3% a layer; mostly they are 1e-7 to 1e-2 apart."""
