"""``run.py bench comparisons``: a fixed list of cases, ours beside Transformers, on this machine."""
