"""The trainer mixin, the state of its run, and what a run does beside its loss."""
