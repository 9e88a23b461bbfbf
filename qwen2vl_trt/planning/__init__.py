"""Capacity on paper: how many GPUs a model needs, from counts of arithmetic and bytes."""
