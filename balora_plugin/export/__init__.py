"""Adapters as data: algebra of factors, one rank, plain PiSSA, merging, their card."""
