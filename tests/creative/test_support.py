"""Lexical support: words that no fact contains are found in any spelling, and words of the facts are not reported."""

import pytest

from hllm_torchrec.creative.support import support

FACTS = ("Aliens (1986)", "Marines fight monsters on a distant colony. Budget: 18,500,000 dollars. Café scenes.")


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("Aliens: marines fighting a monster, for fans of colonies", ()),
        ("ALIENS of 1986, in a CAFE", ()),
        ("It cost 18500000 dollars", ("cost",)),
        ("Aliens, with Sigourney Weaver", ("Sigourney", "Weaver")),
        ("Aliens (1987)", ("1987",)),
        ("No monsters", ("No",)),  # a negation is a claim
        ("Aliens never fight", ("never",)),
        ("You will love it", ("love",)),
        ("for you, and for them", ()),
        ("", ()),
    ],
)
def test_each_word_is_looked_for(text: str, missing: tuple[str, ...]) -> None:
    assert support(text, FACTS).missing == missing


def test_the_share_counts_content_words() -> None:
    found = support("Aliens fight Predators and the marines", FACTS)
    assert (found.words, found.share) == (4, 0.75)
    assert support("of the", FACTS).share == 1.0


def test_more_words_can_be_allowed() -> None:
    assert support("Thrilling aliens", FACTS, allowed=("thriller thrilling",)).missing == ()


def test_texts_without_spaces_are_compared_by_character() -> None:
    # Green tea without sugar; "vitamins" is in no fact.
    assert support("无糖绿茶", ("绿茶", "无糖")).missing == ()
    assert support("绿茶维", ("绿茶",)).missing == ("维",)
    assert support("がぎ", ("がぎぐ",)).missing == () and support("か", ("が",)).missing == ("か",)
