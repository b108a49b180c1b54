"""Every YAML of example_configs/: its base model's shapes, a tiny one in its place, the page that lists them."""
