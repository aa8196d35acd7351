"""Filters of personalized texts. Each rule that a text breaks is a reason to drop the text.

The facts of an item are its source text and its description. A description may contain sentences that instruct a
language model ("ignore all previous instructions"). They do not count as facts, so a text that follows them is not
supported. These sentences are recognized by a list of phrases, which makes such attacks harder but not impossible.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hllm_torchrec.creative.support import stem, support, words


@dataclass(frozen=True)
class TextRules:
    """Limits of the filters.

    longest: maximum number of characters; added_words: maximum number of words that the source does not contain,
    counted with repetitions; support: minimum share of content words that occur in the facts; allowed: words that may
    occur without being in the facts; alike: two texts of an item are nearly equal if the Jaccard index of their words
    is at least this (0: never).
    """

    longest: int = 300
    added_words: int = 10
    support: float = 1.0
    allowed: tuple[str, ...] = ()
    alike: float = 0.9


class Verdict(NamedTuple):
    """Result of `check_text`.

    checks: values that the filters compute (support, added_words), by name; empty for an empty or too long text.
    reasons: names of the rules that the text breaks.
    """

    checks: dict[str, float]
    reasons: list[str]


EMPTY, LONG, LINES = "empty", "too long", "several lines or control characters"
EQUAL, ADDED, UNSUPPORTED = "equal to the source", "too many added words", "words that the facts do not have"
ADDRESS, MARKUP, PERSONAL = "address, number or URL", "markup", "age or place of the reader"
USER_ID, INSTRUCTION, ALIKE = "a user's id", "part of the instructions", "nearly the same as another of the item"

_ADDRESS = re.compile(
    r"://|\bwww\.|\S@\S|(?<!\w)@\w|\b[\w-]+\.(?:com|net|org|info|biz|io|co|app|shop|ru|cn|de|uk|xyz)\b"
    r"|(?<![\d.])\+?\d(?:[\s()./-]{0,2}\d){8,}",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"<[a-z/!|][^<>]*>|<\||\|>|&(?:#\w+|[a-z]{2,8});|\*\*|__|`|^\s*#+\s|\]\(|[{}]", re.IGNORECASE)
_PERSONAL = re.compile(
    r"\b\d{1,3}[\s-]*(?:years?|yrs?)[\s-]*olds?\b|\b(?:age[ds]?|over|under)[\s-]+\d{1,3}s?\b"
    r"|\bin (?:your|their|his|her) (?:teens|(?:twen|thir|for|fif|six|seven|eigh)ties|\d0s)\b"
    r"|\b(?:teen(?:s|age\w*)?|toddlers?|pensioners?|seniors|elderly|middle-aged|millennials?|boomers?|gen[\s-]z)\b"
    r"|\b(?:near|around) (?:you|me|here)\b|\bnearby\b"
    r"|\b(?:in|from|around) your (?:area|city|town|country|region|state|neighbou?rhood)\b|\byour home\s?town\b",
    re.IGNORECASE,
)
_TO_A_MODEL = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b.{0,40}\b(?:instruction|prompt|rule|above|previous|prior|everything)"
    r"|\b(?:system|developer) (?:prompt|message)\b|\byou are (?:now|an? (?:ai|assistant|language model))\b"
    r"|\bas an ai\b"
    r"|\b(?:write|answer|reply|respond|output|print|say|repeat) (?:only|exactly|instead|with|the following)\b"
    r"|\b(?:assistant|system|user|human) ?:",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s+|\n+")  # noqa: RUF001
_COPIED_WORDS = 6
"""A text that contains this many consecutive words of the instructions counts as a copy of them."""


def check_text(
    text: str,
    source: str,
    description: str = "",
    rules: TextRules | None = None,
    instructions: Sequence[str] = (),
    forbidden: Iterable[str] = (),
) -> Verdict:
    """Apply all rules that concern one text.

    Args:
        source: text of the item that `text` replaces, such as its title.
        instructions: instructions to the writer, which the text must not repeat.
        forbidden: words, such as ids of users, that the text may contain only if the facts contain them.
    """
    rules = rules or TextRules()
    if not text.strip():
        return Verdict({}, [EMPTY])
    if len(text) > rules.longest:
        return Verdict({}, [LONG])
    facts = [source, *facts_of(description)]
    found, added = support(text, facts, rules.allowed), added_words(text, source)
    known = " ".join(facts).casefold()
    broken = {
        LINES: not text.isprintable(),
        EQUAL: [stem(word) for word in words(text)] == [stem(word) for word in words(source)],
        ADDED: added > rules.added_words,
        UNSUPPORTED: found.share < rules.support,
        ADDRESS: _ADDRESS.search(text) is not None,
        MARKUP: _MARKUP.search(text) is not None,
        PERSONAL: any(match[0].casefold() not in known for match in _PERSONAL.finditer(text)),
        USER_ID: any(_has_word(text, one) and not _has_word(known, one.casefold()) for one in forbidden),
        INSTRUCTION: any(copies(text, one) for one in instructions),
    }
    checks = {"support": found.share, "added_words": float(added)}
    return Verdict(checks, [reason for reason, is_broken in broken.items() if is_broken])


def facts_of(description: str) -> list[str]:
    """Sentences of a description, except those that instruct a language model."""
    return [one for one in _SENTENCE_END.split(description) if not _TO_A_MODEL.search(one)]


def added_words(text: str, source: str) -> int:
    """Count the words of `text`, with repetitions, that do not occur in `source`."""
    known = {stem(word) for word in words(source)}
    return sum(stem(word) not in known for word in words(text))


def copies(text: str, instruction: str) -> bool:
    """True if `text` contains _COPIED_WORDS consecutive words of an instruction."""
    own, told = ([word.casefold() for word in words(one)] for one in (text, instruction))
    runs = {tuple(told[i : i + _COPIED_WORDS]) for i in range(len(told) - _COPIED_WORDS + 1)}
    return any(tuple(own[i : i + _COPIED_WORDS]) in runs for i in range(len(own) - _COPIED_WORDS + 1))


def nearly_equal(texts: Sequence[str], alike: float) -> list[bool]:
    """Mark the texts of an item that have nearly the same words as an earlier unmarked text: True for marked texts.

    Two texts have nearly the same words if the Jaccard index of their sets of word stems is at least `alike`.
    """
    kept: list[set[str]] = []
    found = []
    for text in texts:
        own = {stem(word) for word in words(text)}
        is_copy = alike > 0 and any(len(own & other) >= alike * max(1, len(own | other)) for other in kept)
        found.append(is_copy)
        if not is_copy:
            kept.append(own)
    return found


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None
