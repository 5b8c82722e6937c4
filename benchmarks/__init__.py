"""Benchmarks: one command per table, run from the repository's root.

README and docs quote what they print.
"""
