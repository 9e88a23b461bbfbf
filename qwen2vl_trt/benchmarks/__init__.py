"""Speed beside Transformers in the same run: ``bench`` of an engine folder, ``comparisons``, a fixed list of cases."""
