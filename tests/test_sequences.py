"""Prompt caches and the contexts that go with them."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import BatchKVCache, KVCache, RotatingKVCache

from mlx_od_moe.cache_rows import Place, Row
from mlx_od_moe.sequences import MOST_KEPT, Sequences


class Runner:
    """Remembers what it was told."""

    def __init__(self):
        self.calls = []

    def reset(self, sequence):
        self.calls.append(("reset", sequence))

    def trim(self, sequence, tokens):
        self.calls.append(("trim", sequence, tokens))

    def fork(self, sequence, to):
        self.calls.append(("fork", sequence, to))


def entered(sequences: Sequences, runner: Runner, places, tokens: int = 1):
    """(sequences, what the runner was told), of [(row, offset)]."""
    runner.calls.clear()
    rows, offsets = zip(*places, strict=True)
    return sequences.enter(Place(rows, offsets), tokens), list(runner.calls)


def test_what_follows_goes_on_and_what_does_not_begins_anew():
    sequences = Sequences(runner := Runner())
    one, other = Row(), Row()
    assert entered(sequences, runner, [(one, 0)], 5) == ([1], [("reset", 1)])
    assert sequences.follows(Place((one,), (5,)), 1)
    assert entered(sequences, runner, [(one, 5)]) == ([1], [])
    assert not sequences.follows(Place((one,), (3,)), 1)
    assert entered(sequences, runner, [(one, 3)]) == ([1], [("trim", 1, 3)])
    # Four are in the context, but the cache holds nine.
    assert entered(sequences, runner, [(one, 9)]) == ([1], [("reset", 1)])
    assert entered(sequences, runner, [(other, 4)]) == ([2], [("reset", 2), ("reset", 2)])


def test_without_a_cache_a_prompt_begins_anew():
    sequences = Sequences(runner := Runner())
    assert not sequences.follows(Place(), 7)
    assert sequences.enter(Place(), 7) == [0]
    assert runner.calls == [("reset", 0)]
    assert sequences.follows(Place(), 1)
    assert sequences.enter(Place(), 1) == [0]
    assert runner.calls == [("reset", 0)]


def test_the_sequence_not_used_longest_goes():
    sequences = Sequences(runner := Runner())
    rows = [Row() for _ in range(MOST_KEPT)]
    for i, row in enumerate(rows):
        assert entered(sequences, runner, [(row, 0)])[0] == [i + 1]
    assert entered(sequences, runner, [(rows[0], 1)])[0] == [1]
    assert entered(sequences, runner, [(Row(), 0)]) == ([2], [("reset", 2)])
    # The one that went is another sequence when it comes back.
    assert entered(sequences, runner, [(rows[1], 1)]) == ([3], [("reset", 3), ("reset", 3)])


def test_what_a_pass_needs_does_not_go_for_its_own_newcomers():
    sequences = Sequences(runner := Runner())
    rows = [Row() for _ in range(MOST_KEPT)]
    for row in rows:
        sequences.enter(Place((row,), (0,)), 1)
    batch = [(Row(), 0), (rows[0], 1)]  # of all rows it is rows[0] that was not used longest
    assert entered(sequences, runner, batch) == ([2, 1], [("reset", 2)])
    with pytest.raises(ValueError, match=f"{MOST_KEPT} contexts are kept, a pass has"):
        entered(sequences, runner, [(Row(), 0)] * (MOST_KEPT + 1))


def test_a_copy_begins_with_what_it_was_copied_from():
    sequences = Sequences(runner := Runner())
    one = Row()
    sequences.enter(Place((one,), (0,)), 7)
    twin = copy.deepcopy(one)
    calls = [("reset", 2), ("fork", 1, 2), ("trim", 2, 2)]
    assert entered(sequences, runner, [(twin, 5)]) == ([2], calls)
    assert entered(sequences, runner, [(one, 7)]) == ([1], [])
    # Of tokens that the original has not seen nothing can be copied.
    assert entered(sequences, runner, [(copy.deepcopy(one), 9)])[1] == [("reset", 3), ("reset", 3)]


def test_rows_that_begin_with_padding_have_fewer_tokens():
    sequences = Sequences(runner := Runner())
    short, long = Row(), Row()
    assert entered(sequences, runner, [(short, -3), (long, 0)], 5)[0] == [1, 2]
    assert entered(sequences, runner, [(short, 2), (long, 5)]) == ([1, 2], [])


def test_missed_tokens_end_all():
    sequences = Sequences(runner := Runner())
    one = Row()
    sequences.enter(Place((one, Row()), (0, 0)), 3)
    runner.calls.clear()
    sequences.forget()
    assert runner.calls == [("reset", 0), ("reset", 1), ("reset", 2)]
    assert entered(sequences, runner, [(one, 3)]) == ([1], [("reset", 1), ("reset", 1)])


def filled(cache, tokens, batch=1):
    cache.update_and_fetch(*(mx.ones((batch, 1, tokens, 4)) for _ in range(2)))
    return cache


def numbers(cache, batch):
    return [row.number for row in Place.of(batch, [cache]).rows]


@pytest.mark.parametrize("make", [KVCache, lambda: RotatingKVCache(max_size=32)])
def test_rows_are_followed_through_batches(make):
    single = [filled(make(), tokens) for tokens in (3, 5, 4)]
    one, two, three = (numbers(cache, 1)[0] for cache in single)
    batch = type(single[0]).merge(single)
    place = Place.of(3, [batch])
    assert [row.number for row in place.rows] == [one, two, three]
    assert place.offsets == (3, 5, 4)
    filled(batch, 1, batch=3)
    assert Place.of(3, [batch]).offsets == (4, 6, 5)
    batch.filter([2, 0])
    assert numbers(batch, 2) == [three, one]
    assert Place.of(2, [batch]).offsets == (5, 4)
    other = type(single[0]).merge([filled(make(), 2)])
    (four,) = numbers(other, 1)
    batch.extend(other)
    assert numbers(batch, 3) == [three, one, four]
    taken = batch.extract(1)
    assert numbers(taken, 1) == [one]
    assert Place.of(1, [taken]).offsets == (4,)
    copied = copy.deepcopy(batch)
    assert [row.parent for row in Place.of(3, [copied]).rows] == [three, one, four]
    assert not set(numbers(copied, 3)) & {three, one, four}
    batch.filter(mx.array([0]))
    assert numbers(batch, 1) == [three]


def test_a_place_that_cannot_be_known_is_none():
    assert Place.of(1, None) == Place()
    assert Place.of(1, []) == Place()
    assert Place.of(1, [object()]) == Place()
    padded = BatchKVCache([0, 0])
    Place.of(2, [padded])
    padded.prepare(right_padding=[0, 2])
    assert Place.of(2, [padded]) == Place()
    filled(padded, 5, batch=2)
    padded.finalize()
    assert Place.of(2, [padded]).offsets == (5, 3)
