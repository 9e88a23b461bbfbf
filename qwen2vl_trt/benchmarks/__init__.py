"""Speed, in the same run as Transformers'.

The rooms, each built on those before it: ``floors`` is what a device could do at best, ``subjects`` runs our engines
and Transformers' models, ``bench`` measures and reports any engine folder, ``comparisons`` is a list of cases for it,
those of the seed implementation among them. What all need: ``machine``, ``workers``, ``random_model``, ``files``.
"""
