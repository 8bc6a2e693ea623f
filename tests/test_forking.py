"""Locks that survive a fork."""

from __future__ import annotations

import os
import signal
import threading
import warnings

import pytest

from jaxkv.memo.forking import Lock

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")


class Counter:
    """Two numbers that are equal whenever the lock is free."""

    def __init__(self) -> None:
        self.lock = Lock(self.forked)
        self.one = self.two = self.forks = 0

    def forked(self) -> None:
        with self.lock:
            self.forks += 1

    def count(self) -> None:
        with self.lock:
            self.one += 1
            self.two += 1


def status_of_child(work) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside threads, which is what is tested
        child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_child_finds_the_lock_free_and_nothing_half_changed():
    counter, ended = Counter(), threading.Event()

    def keep_counting() -> None:
        while not ended.is_set():
            counter.count()

    def use() -> bool:
        same = counter.one == counter.two and counter.forks == 1
        worker = threading.Thread(target=counter.count)
        worker.start()
        worker.join(60)
        return same and counter.one == counter.two and not worker.is_alive()

    thread = threading.Thread(target=keep_counting)
    thread.start()
    statuses = [status_of_child(use) for _ in range(8)]
    ended.set()
    thread.join()
    assert statuses == [0] * 8
    assert counter.one == counter.two and counter.forks == 0


def test_who_forks_while_holding_the_lock_gives_it_back_in_the_child_too():
    counter = Counter()

    def give_back() -> bool:
        counter.lock.__exit__()
        worker = threading.Thread(target=counter.count, daemon=True)
        worker.start()
        worker.join(60)
        return not worker.is_alive()

    with counter.lock:
        assert status_of_child(give_back) == 0
    counter.count()


def test_what_is_gone_is_not_called():
    counter = Counter()
    lock = counter.lock
    del counter
    assert status_of_child(lambda: lock.__enter__() is None) == 0


def test_a_fork_does_not_wait_for_a_thread_that_waits_for_it():
    pairs = [(Lock(), Lock()) for _ in range(8)]

    def fork_again_and_again() -> bool:
        signal.alarm(60)  # ends a child that waits forever
        ended = threading.Event()

        def one_in_the_other() -> None:
            while not ended.is_set():
                for outer, inner in pairs:
                    with outer, inner:
                        pass

        thread = threading.Thread(target=one_in_the_other)
        thread.start()
        statuses = [status_of_child(lambda: True) for _ in range(12)]
        ended.set()
        thread.join()
        return statuses == [0] * 12

    assert status_of_child(fork_again_and_again) == 0
