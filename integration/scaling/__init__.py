"""docs/scaling.md: what large models take, counted from their configs, and the counts held against measurements."""
