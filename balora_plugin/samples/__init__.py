"""A user's own data: rows of one JSONL file, what they are, a held-out part of them, and a model to read them with."""
