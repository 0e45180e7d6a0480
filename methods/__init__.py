"""Adapter methods by name: what the trainer and inference know of one, and all they know."""
