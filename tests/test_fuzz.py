"""Random calls against the reference: other ones every time, the same again with NBBN_FUZZ_SEED."""

import os
import secrets
from collections import Counter

import pytest
from fuzzing import Case

from nbbn.cpu import threads


def fuzz(number, every):
    first = int(os.environ.get("NBBN_FUZZ_SEED", secrets.randbits(40)))
    print(f"NBBN_FUZZ_SEED={first}, {number} cases")
    done = Counter()
    for seed in range(first, first + number):
        case = Case(seed, every)
        try:
            with threads.pretend(bool(every and seed % 4 == 0)):
                done[case.operation, case.check()] += 1
        except Exception as error:
            error.add_note(f"NBBN_FUZZ_SEED={seed}: {case}")
            raise
    return done


def assert_covered(done):
    """Every operation, and mostly not refused."""
    assert {name for name, _ in done} == {"stats", "normalize", "evaluate", "train", "backward", "ema", "merge"}
    assert sum(number for (_, refused), number in done.items() if refused) < sum(done.values()) / 4, done


def test_500_random_calls_as_the_reference():
    assert_covered(fuzz(500, every=False))


@pytest.mark.nightly
def test_20000_random_calls_of_every_dtype_as_the_reference():
    assert_covered(fuzz(20_000, every=True))
