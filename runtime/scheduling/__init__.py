"""Requests that share a decoder."""
