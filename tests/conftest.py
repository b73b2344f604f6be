import os

import pytest
from hypothesis import HealthCheck, settings

import nbbn

# a first example may compile a kernel: no deadline; the seed of a failure is printed
settings.register_profile("nbbn", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nbbn")


@pytest.fixture(params=["numpy", "cpu"])
def backend(request):
    """Run the test on every backend this machine has."""
    with nbbn.use_backend(request.param):
        yield request.param


@pytest.fixture
def threads():
    """The most threads this machine has; afterwards the number is what it was."""
    before = nbbn.get_num_threads()
    yield min(2, os.cpu_count() or 1)
    nbbn.set_num_threads(before)


@pytest.fixture
def small_blocks(monkeypatch):
    """Files are read in pieces of 96 bytes, two to a job: every way of cutting, on a few hundred values."""
    from nbbn.files import arrays, summary

    monkeypatch.setattr(arrays, "BLOCK_BYTES", 96)
    monkeypatch.setattr(summary, "PIECES_PER_JOB", 2)
