"""Inheritance under control: how much of a fault put into pre-training does each method leave, and at what cost?"""
