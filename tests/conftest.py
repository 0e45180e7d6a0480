"""Settings that every test needs."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def nora_cache_outside_home(tmp_path_factory):
    """The cache of outer factors goes to a temporary folder: tests write nothing to the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NORA_CACHE_DIR", str(tmp_path_factory.mktemp("nora-cache")))
        yield
