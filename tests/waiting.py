"""Waiting for what another process does."""

import time


def until(found, seconds=60):
    """What it gives as soon as that is something."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return result
