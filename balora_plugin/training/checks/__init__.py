"""What a run refuses before its first step, by subject."""
