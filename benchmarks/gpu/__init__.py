"""Everything that is measured on a GPU, by one command: `python -m benchmarks.gpu`."""
