"""One question a file: a docstring with the question, a list of configs, one call."""
