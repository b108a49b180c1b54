"""One micro-batch, from what is asked to terms and output: language models and classifiers."""
