"""Detection rates of the support filter: own sentences pass, sentences of other items do not."""

from tests.helpers.scripts import bench_module

creator_support = bench_module("creator_support")


def test_rates_count_what_the_filter_drops() -> None:
    subjects = ("marines", "detectives", "farmers", "singers", "doctors", "pirates")
    descriptions = [
        f"{one.title()} of station{i} repair engines{i} beside rivers{i} under comets{i}. Later those {one} leave "
        f"harbours{i}, towers{i}, deserts{i}, forests{i} and islands{i} for castles{i}."
        for i, one in enumerate(subjects)
    ]
    titles = [f"Story {i}" for i in range(6)]
    found = creator_support.drop_rates(descriptions, titles, 50, 0)
    assert found["own"] == 0 and found["other"] == 1 and found["negated"] == 1 and 0.5 < found["one word"] <= 1
    assert creator_support.drop_rates(descriptions, titles, 50, 0) == found
    # A filter that supports everything would drop nothing: equal items.
    equal = creator_support.drop_rates(descriptions[:1] * 6, titles[:1] * 6, 50, 0)
    assert equal["other"] == equal["one word"] == 0
