"""Several matrices at once on a CPU, each by one thread."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from optimum_dobisvd.factorization.parallel import in_threads, one_thread_if_small, workers_for


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items_by_one_thread_each_without_gradients() -> None:
    def work(item: int) -> tuple[int, int, bool]:
        time.sleep(0.01 * (3 - item % 4))
        return item, torch.get_num_threads(), torch.is_grad_enabled()

    assert list(in_threads(work, range(9), 4)) == [(item, 1, False) for item in range(9)]


def test_items_are_drawn_as_they_are_needed_in_the_callers_thread() -> None:
    drawn: list[int] = []

    def items() -> Iterator[int]:
        for item in range(20):
            assert threading.current_thread() is threading.main_thread()
            drawn.append(item)
            yield item

    for done, _ in enumerate(in_threads(lambda item: item, items(), 2)):
        assert len(drawn) <= done + 3


def test_an_error_ends_it() -> None:
    done: list[int] = []

    def work(item: int) -> int:
        if item == 2:
            raise ValueError("the third")
        done.append(item)
        return item

    found = in_threads(work, range(1000), 2)
    assert [next(found), next(found)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        list(found)
    assert len(done) < 10


def test_one_worker_is_the_caller() -> None:
    found = list(in_threads(lambda item: (item, torch.get_num_threads(), threading.current_thread()), range(2), 1))
    assert found == [(item, 4, threading.main_thread()) for item in range(2)]


def test_large_matrices_and_devices_keep_all_threads() -> None:
    cpu = torch.device("cpu")
    assert (workers_for(576, None), workers_for(2048, cpu), workers_for(4096, cpu)) == (4, 4, 1)
    assert workers_for(576, torch.device("cuda")) == 1
    torch.set_num_threads(64)
    assert workers_for(576, cpu) == 8
    assert list(in_threads(lambda _: torch.get_num_threads(), [0], 8)) == [8]
    torch.set_num_threads(4)
    for size, threads in ((576, 1), (4096, 4)):
        with one_thread_if_small(size, cpu):
            assert torch.get_num_threads() == threads
