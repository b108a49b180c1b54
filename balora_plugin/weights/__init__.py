"""Weights that set themselves: pure formulas, one file a rule, from what was measured to the next step's weights.

No tensors, no trainer: `training/own_weights.py` feeds them. docs/method.md has the formulas.
"""
