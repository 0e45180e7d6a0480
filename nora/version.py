"""The version of the distribution nora-peft, which pyproject.toml reads here."""

__version__ = "0.3.0"
