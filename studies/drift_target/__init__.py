"""Whether `drift_target` holds its budget: `python -m studies.drift_target --help`."""
