"""How many bytes a training step takes, counted on a model that has shapes and no values, and what would save some."""
