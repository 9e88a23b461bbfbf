"""Pixels to patches in window order."""
