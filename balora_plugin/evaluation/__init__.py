"""What a model can do and how far an adapter moved it: base and adapter side by side, paired by document."""
