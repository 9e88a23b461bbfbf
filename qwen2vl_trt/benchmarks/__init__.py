"""Speed, in the same run as a peer's.

The modules here are the commands (``command`` is ``run.py bench``; ``python -m qwen2vl_trt.benchmarks.vision`` and the
like compare one part each) and what all of them need: ``measure``, ``workers``, ``random_model``, ``files``. The rooms,
each built on those before it: ``floors`` is what a device could do at best, ``subjects`` runs our engines and
Transformers' models, ``bench`` measures and reports any engine folder, ``seed`` makes the seed implementation's
comparisons.
"""
