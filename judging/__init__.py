"""How good an adapter is: encoders, scores, statistics, protocols; `python -m judging.evaluate`."""
