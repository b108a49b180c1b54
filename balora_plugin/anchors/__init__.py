"""Anchors: text without labels on which a run holds its predictions to the pre-trained model's."""
