"""Prompt caches and the contexts that go with them."""

from mlx_od_moe.sequences import MOST_KEPT, Place, Sequences


class Runner:
    """Remembers what it was told."""

    def __init__(self):
        self.calls = []

    def reset(self, sequence):
        self.calls.append(("reset", sequence))

    def trim(self, sequence, tokens):
        self.calls.append(("trim", sequence, tokens))


def entered(sequences: Sequences, runner: Runner, place: Place, tokens: int = 1):
    runner.calls.clear()
    return sequences.enter(place, tokens), list(runner.calls)


def test_what_follows_goes_on_and_what_does_not_begins_anew():
    sequences = Sequences(runner := Runner())
    assert entered(sequences, runner, Place(77, 0), 5) == (1, [("reset", 1)])
    assert entered(sequences, runner, Place(77, 5)) == (1, [])
    assert entered(sequences, runner, Place(77, 3)) == (1, [("trim", 1, 3)])
    # Four are in the context, but the cache holds nine.
    assert entered(sequences, runner, Place(77, 9)) == (1, [("reset", 1)])
    assert entered(sequences, runner, Place(88, 4)) == (2, [("reset", 2), ("reset", 2)])


def test_the_sequence_not_used_longest_goes():
    sequences = Sequences(runner := Runner())
    for cache in range(1, MOST_KEPT + 1):
        assert sequences.enter(Place(cache, 0), 1) == cache
    assert sequences.enter(Place(1, 1), 1) == 1
    assert entered(sequences, runner, Place(99, 0)) == (2, [("reset", 2)])
    assert sequences.enter(Place(1, 2), 1) == 1
    # The one that went is another sequence when it comes back.
    assert entered(sequences, runner, Place(2, 1)) == (3, [("reset", 3), ("reset", 3)])


def test_missed_tokens_end_all():
    sequences = Sequences(runner := Runner())
    sequences.enter(Place(1, 0), 3)
    sequences.enter(Place(2, 0), 3)
    runner.calls.clear()
    sequences.forget()
    assert runner.calls == [("reset", 0), ("reset", 1), ("reset", 2)]
    assert entered(sequences, runner, Place(1, 3)) == (1, [("reset", 1), ("reset", 1)])
