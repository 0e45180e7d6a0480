"""The study: every method on many subjects, each at its own best learning rate; `python -m benchmarks.study --help`."""
