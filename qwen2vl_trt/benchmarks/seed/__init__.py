"""``run.py bench seed``: the seed implementation's comparisons, on this machine."""
