"""What a run records of itself: memory, and a card that survives what users write."""

import numpy as np
import pytest
import torch

from runs.record import PeakMemory


def take(megabytes):
    np.ones(megabytes * 10**6, dtype=np.uint8)


def test_the_peak_is_the_trainings_and_not_that_of_the_looks_between_its_steps():
    earlier = PeakMemory(torch.device("cpu"))
    take(600)
    peak = earlier.megabytes
    if PeakMemory(torch.device("cpu")).megabytes > peak - 300:
        pytest.skip("this system can't forget a peak")
    memory = PeakMemory(torch.device("cpu"))
    start = memory.megabytes
    take(300)
    with memory.pause():
        take(600)
    assert start + 250 < memory.megabytes < start + 450


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_peak_of_a_gpu_leaves_pauses_out():
    memory = PeakMemory(torch.device("cuda"))
    start = memory.megabytes
    with memory.pause():
        torch.ones(200_000_000, dtype=torch.uint8, device="cuda")
    assert memory.megabytes == pytest.approx(start, abs=1)
    torch.ones(100_000_000, dtype=torch.uint8, device="cuda")
    assert memory.megabytes > start + 90
