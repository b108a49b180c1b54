"""What the studies share: cells kept as JSON and not run twice, paired bootstrap intervals, fronts, tables."""
