"""Data and scores of sequence classification."""
