"""Forgetting at equal task loss: does a term give a point that smaller rates, early stopping or scaling do not?"""
