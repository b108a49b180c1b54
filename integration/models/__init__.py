"""Tiny models of the architectures that people fine-tune, and what each of them is taken through."""
