"""Operations in line: one after the other for each thing, at most so many at once."""

from __future__ import annotations

from vmlab.manager.operator.queue import Entry, Queue


def entry(number: int, *keys: str, immediate: bool = False) -> Entry:
    return Entry(f"op{number}", "machine.start", number, frozenset(keys), immediate=immediate)


def started(queue: Queue) -> list[int]:
    """The numbers of those that begin now."""
    found = []
    while (each := queue.next()) is not None:
        found.append(each.number)
    return found


def test_operations_on_one_thing_go_one_after_the_other_in_their_order() -> None:
    queue = Queue(workers=8)
    entries = [entry(n, "machine:a") for n in range(3)]
    for each in entries:
        queue.add(each)
    order = []
    for each in entries:
        order += started(queue)
        queue.remove(each)
    assert order == [0, 1, 2]
    assert not len(queue)


def test_one_that_needs_two_things_waits_for_both_and_holds_up_those_behind_it() -> None:
    queue = Queue(workers=8)
    first, second = entry(0, "machine:a"), entry(1, "disk:d")
    both, behind = entry(2, "machine:a", "disk:d"), entry(3, "disk:d")
    for each in (first, second, both, behind):
        queue.add(each)
    assert started(queue) == [0, 1]
    queue.remove(first)
    assert started(queue) == []
    queue.remove(second)
    assert started(queue) == [2]
    queue.remove(both)
    assert started(queue) == [3]


def test_no_more_than_the_workers_run_at_once_but_what_is_immediate_does() -> None:
    queue = Queue(workers=2)
    entries = [entry(n, f"machine:{n}") for n in range(4)]
    for each in entries:
        queue.add(each)
    assert started(queue) == [0, 1]
    queue.add(entry(9, immediate=True))
    assert started(queue) == [9]
    queue.remove(entries[0])
    assert started(queue) == [2]


def test_one_with_a_lower_number_that_comes_late_goes_before_those_that_wait() -> None:
    queue = Queue(workers=8)
    running = entry(5, "machine:a")
    queue.add(running)
    assert started(queue) == [5]
    queue.add(entry(7, "machine:a"))
    queue.add(entry(6, "machine:a"))
    queue.add(entry(1, "machine:a"))
    assert [each.number for each in queue.waiting_for("machine:a")] == [5, 1, 6, 7]
    queue.remove(running)
    assert started(queue) == [1]


def test_one_that_is_postponed_keeps_its_lines_and_gives_its_worker_back() -> None:
    queue = Queue(workers=1)
    first, second, other = entry(0, "machine:a"), entry(1, "machine:a"), entry(2, "machine:b")
    for each in (first, second, other):
        queue.add(each)
    assert started(queue) == [0]
    queue.pause(first)
    first.postponed = True
    assert started(queue) == [2]
    queue.remove(other)
    assert started(queue) == []
    queue.offer_again(first)
    assert started(queue) == [0]
    queue.remove(first)
    assert started(queue) == [1]


def test_one_that_is_removed_while_it_waits_never_begins_and_removing_it_again_is_nothing() -> None:
    queue = Queue(workers=1)
    first, second = entry(0, "machine:a"), entry(1, "machine:a")
    queue.add(first)
    queue.add(second)
    queue.remove(first)
    queue.remove(first)
    assert first.ended.is_set()
    assert started(queue) == [1]
    assert [each.id for each in queue] == ["op1"]
    assert queue.get("op0") is None
