"""Batch inference on many workers with Ray Data: tables or folders of images in, Parquet out, each row exactly once."""
