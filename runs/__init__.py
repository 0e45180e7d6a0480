"""One training run on a disk: its folder and lock, checkpoints, record, card and exports."""
