"""Cached features of a frozen visual encoder: their format, checks, and writing them."""
