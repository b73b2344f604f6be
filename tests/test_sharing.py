"""Threads share tasks: every task once, whoever comes late; and who comes late is not waited for."""

import threading
from itertools import islice

import numpy as np
import pytest
from numba import njit

import nbbn
from nbbn.cpu import saved, sharing, threads

shared, next_task, someone_was_late = sharing.shared, sharing.next_task, sharing.someone_was_late


@njit(nogil=True)
def nothing_taken(workers):
    return shared(workers)


@njit
def worker_at(taken, worker, tasks):
    """A worker who stops after each task until it is asked for the next."""
    task = next_task(worker, taken, tasks, -1)
    while task >= 0:
        yield task
        task = next_task(worker, taken, tasks, task)


@njit(nogil=True)
def late(taken):
    return someone_was_late(taken)


@njit(nogil=True)
def work(taken, worker, tasks, done):
    task = next_task(worker, taken, tasks, -1)
    while task >= 0:
        done[task, worker] += 1
        task = next_task(worker, taken, tasks, task)


@pytest.mark.parametrize(("workers", "tasks"), [(1, 5), (2, 7), (3, 2), (4, 0), (5, 64)])
def test_a_worker_alone_does_all_beginning_with_its_own(workers, tasks):
    for worker in range(workers):
        numbers = list(worker_at(nothing_taken(workers), worker, tasks))
        assert sorted(numbers) == list(range(tasks))
        own = range(tasks * worker // workers, tasks * (worker + 1) // workers)
        assert numbers[: len(own)] == list(own)


def test_who_comes_late_goes_on_where_the_others_are():
    taken = nothing_taken(2)
    first, second = worker_at(taken, 0, 8), worker_at(taken, 1, 8)
    assert list(islice(first, 6)) == [0, 1, 2, 3, 4, 5]
    assert list(second) == [6, 7]
    assert list(first) == []


@pytest.mark.parametrize("workers", [2, 5])
def test_every_task_is_done_once_by_threads_at_once(workers):
    tasks = 20_000
    for _ in range(5):
        taken, done = nothing_taken(workers), np.zeros((tasks, workers), np.int64)
        crew = [threading.Thread(target=work, args=(taken, k, tasks, done)) for k in range(workers)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        assert (done.sum(1) == 1).all()


def test_late_is_who_begins_when_another_has_ended():
    taken = nothing_taken(2)
    first, second = worker_at(taken, 0, 2), worker_at(taken, 1, 2)
    assert [next(first), next(second)] == [0, 1]
    assert list(first) == list(second) == []
    assert not late(taken)
    taken = nothing_taken(2)
    assert list(worker_at(taken, 0, 2)) == [0, 1]
    assert list(worker_at(taken, 1, 2)) == []
    assert late(taken)
    taken = nothing_taken(1)
    assert list(worker_at(taken, 0, 2)) == [0, 1]
    assert not late(taken)


@pytest.fixture
def undecided(monkeypatch):
    """As in a new process with two threads; what the test notes is forgotten after it."""
    monkeypatch.setattr(threads, "_alone", 0)
    monkeypatch.setattr(threads, "_too_little", 0)
    monkeypatch.setattr(threads, "_pause", 1)
    monkeypatch.setattr(threads, "_forked", False)
    monkeypatch.setattr(threads, "_chosen", 2)


def test_threads_that_come_late_are_left_alone_for_a_while_that_grows(undecided):
    size = threads.PARALLEL_FROM
    for pause in (2, 4, 8):
        assert not threads.alone(size)
        threads.note(True, size)
        assert [threads.alone(size) for _ in range(pause)] == [True] * pause
    assert not threads.alone(size)
    threads.note(False, size)
    assert not threads.alone(size)
    threads.note(True, size)
    assert [threads.alone(size) for _ in range(3)] == [True, True, False]


def test_the_pause_has_an_end(undecided):
    for size in (threads.PARALLEL_FROM, threads.LONGEST_PAUSE // 3, threads.LONGEST_PAUSE * 2):
        for _ in range(20):
            threads.note(True, size)
        pause = max(1, threads.LONGEST_PAUSE // size)
        assert sum(threads.alone(size) for _ in range(10_000)) == pause


def test_more_work_is_shared_meanwhile(undecided):
    size = threads.PARALLEL_FROM
    threads.note(True, 2 * size)
    assert not threads.alone(2 * size + 1)
    assert threads.alone(2 * size)


def test_no_other_kernel_is_needed_alone(undecided):
    """It might not be compiled: a call would take seconds because a thread came late."""
    x = np.ones((2, 64, 64, 64), np.float32)
    nbbn.batch_norm(x, training=True)
    before = saved.tally.copy()
    threads.note(True, x.size)
    left = threads._alone
    nbbn.batch_norm(x, training=True)
    assert threads._alone == left - 1
    assert saved.tally == before


def test_results_do_not_depend_on_who_comes_late(undecided):
    x = np.random.default_rng(0).standard_normal((2, 64, 64, 64)).astype(np.float32)
    together = nbbn.batch_norm(x, training=True, return_stats=True)
    threads.note(True, x.size)
    alone = nbbn.batch_norm(x, training=True, return_stats=True)
    assert (together[0] == alone[0]).all()
    assert (together[1] == alone[1]).all()
