"""Turns in the queue: of owners within a key, and of keys."""

from __future__ import annotations

from app.batching.fair_queue import FairQueue


def always(entry: str) -> bool:
    return True


def filled(*lines: tuple[str, str, str]) -> FairQueue[str, str]:
    """A queue of (owner, key, one letter per entry)."""
    queue: FairQueue[str, str] = FairQueue()
    for owner, key, entries in lines:
        queue.put(owner, key, entries)
    return queue


def test_owners_take_turns_entry_by_entry() -> None:
    queue = filled(("large", "k", "abcdef"), ("small", "k", "x"), ("medium", "k", "12"))
    assert queue.take("k", 5, always) == ["a", "x", "1", "b", "2"]
    assert queue.take("k", 5, always) == ["c", "d", "e", "f"]


def test_turns_continue_in_the_next_batch() -> None:
    queue = filled(("first", "k", "abc"), ("second", "k", "xyz"))
    batches = [queue.take("k", 1, always) for _ in range(6)]
    assert batches == [["a"], ["x"], ["b"], ["y"], ["c"], ["z"]]


def test_new_owner_is_the_last_in_turn() -> None:
    queue = filled(("first", "k", "ab"), ("second", "k", "x"))
    queue.put("third", "k", "1")
    queue.put("first", "k", "c")
    assert queue.take("k", 9, always) == ["a", "x", "1", "b", "c"]


def test_key_that_was_served_is_the_last_in_turn() -> None:
    queue = filled(("owner", "a", "12"), ("owner", "b", "3"), ("owner", "c", "4"))
    assert list(queue) == ["a", "b", "c"]
    queue.take("a", 1, always)
    assert list(queue) == ["b", "c", "a"]


def test_sizes_count_entries_and_empty_keys_disappear() -> None:
    queue = filled(("one", "a", "12"), ("two", "a", "3"), ("two", "b", "4"))
    assert (len(queue), queue.size("a"), queue.size("b"), queue.size("never")) == (4, 3, 1, 0)
    assert list(queue.heads("a")) == ["1", "3"]
    queue.take("a", 9, always)
    assert (len(queue), queue.size("a"), list(queue)) == (1, 0, ["b"])
    queue.put("one", "b", "")
    assert (len(queue), list(queue.heads("b"))) == (1, ["4"])


def test_discard_removes_an_owner_from_every_key() -> None:
    queue = filled(("one", "a", "12"), ("two", "a", "3"), ("one", "b", "4"))
    assert queue.discard("one", always) == ["1", "2", "4"]
    assert queue.discard("one", always) == []
    assert (len(queue), list(queue)) == (1, ["a"])


def test_discard_leaves_the_other_entries_of_the_owner_in_their_order() -> None:
    queue = filled(("one", "a", "1x2y3"), ("one", "b", "z"))
    assert queue.discard("one", str.isalpha) == ["x", "y", "z"]
    assert (len(queue), list(queue)) == (3, ["a"])
    assert queue.take("a", 9, always) == ["1", "2", "3"]


def test_take_skips_entries_that_are_discarded_on_the_way() -> None:
    queue = filled(("one", "k", "abc"), ("two", "k", "xy"), ("one", "other", "d"))

    def accept(entry: str) -> bool:
        if entry in "abcd":
            queue.discard("one", "abd".__contains__)
            return entry == "c"
        return True

    assert queue.take("k", 9, accept) == ["c", "x", "y"]
    assert (len(queue), list(queue)) == (0, [])


def test_take_of_an_unknown_key_is_empty() -> None:
    assert filled().take("k", 3, always) == []
