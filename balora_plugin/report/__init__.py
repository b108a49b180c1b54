"""What runs have logged, as one HTML page and its pictures."""
