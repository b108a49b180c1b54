"""Benchmarks: ratios inside one run, with machine, versions and command."""
