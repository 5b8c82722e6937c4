"""Benchmarks: one command per table, run from the repository's root.

The README quotes what they print.
"""
