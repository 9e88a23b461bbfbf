"""Checkpoints that other tools have quantised: a module for each format, and one form that all are read into."""
