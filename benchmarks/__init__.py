"""Benchmarks: one command per table, run from the repository's root. See README.md there."""
