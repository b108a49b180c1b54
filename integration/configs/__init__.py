"""Every YAML of example_configs/: the shapes of its base model, a tiny one in its place, and the pages that list them."""
