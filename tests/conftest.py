"""Settings that every test needs."""

import gc

import pytest
from accelerate.state import AcceleratorState
from browser_pages import chromium


@pytest.fixture(autouse=True, scope="session")
def libraries_are_no_garbage():
    """What is imported by now is passed over when garbage is collected: that took a quarter of a small training."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def nora_cache_outside_home(tmp_path_factory):
    """The cache of outer factors goes to a temporary folder: tests write nothing to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORA_CACHE_DIR", str(tmp_path_factory.mktemp("nora-cache")))
        yield


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps one state per process; a user's command has a process of its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def browser():
    with chromium() as browser:
        yield browser
