"""Comparisons of methods, each one command."""
