"""Lexical support of a text: whether each number, name and content word of it occurs in the facts of its item.

Words are compared without case, accents and endings of inflection. So a word that no fact has is found, and a wrong
combination of words that the facts have (`Tom Hanks` of `Tom Cruise` and `Colin Hanks`) is not. Negations count as
content words, because `no sugar` says something else than `sugar`. The list of function words is English; for other
languages more are allowed by the caller. Texts in Chinese and Japanese, which have no spaces, are compared by
character.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

_WORD = re.compile(
    r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]"  # kana and ideographs, one by one
    r"|\d+(?:[.,:/]\d+)*"
    r"|(?:(?![\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff])[^\W\d_])+(?:'(?:[^\W\d_])+)*"
)
_FUNCTION_WORDS = frozenset(
    "a about after all also an and another any are as at be been before being between both but by can could did do "
    "does done down each either else every few for from had has have he her here hers him his how i if in into is it "
    "its just let like many may me might more most much must my of off on once one or other our out over own per she "
    "should since so some such than that the their them then there these they this those through to too under until "
    "up us very was we were what when where whether which while who whom whose why will with would yet you your yours "
    "fan lover reader viewer listener".split()
)
"""English function words, and nouns that address those for whom a text is."""
_ENDINGS = ("ing", "ed", "es", "s")


@dataclass(frozen=True)
class Support:
    """words: number of numbers and content words of a text; missing: those that no fact has, in order, as written."""

    words: int
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the words that are supported; 1 for a text without any."""
        return 1.0 - len(self.missing) / self.words if self.words else 1.0


def support(text: str, facts: Iterable[str], allowed: Iterable[str] = ()) -> Support:
    """Look for each number, name and content word of `text` in `facts`.

    Args:
        facts: texts of the item: its title, its description; what a text of it may say.
        allowed: further words that a text may have.
    """
    known = {stem(word) for fact in (*facts, *allowed) for word in words(fact)}
    content = [word for word in words(text) if stem(word) not in _FUNCTION_STEMS]
    return Support(len(content), tuple(word for word in content if stem(word) not in known))


def words(text: str) -> list[str]:
    """The words and numbers of a text, as written but without accents."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "'"))
    # Recomposed, because kana with a voicing mark and syllables of Hangul are decomposed as well.
    bare = "".join(c for c in plain if not "\u0300" <= c <= "\u036f")
    return _WORD.findall(unicodedata.normalize("NFC", bare))


def stem(word: str) -> str:
    """A word in lower case without its ending: equal for `Fights`, `fighting` and `fight`; numbers without commas."""
    if word[0].isdigit():
        return re.sub(r",(?=\d{3}\b)", "", word)
    found = word.casefold().removesuffix("'s").removesuffix("'")
    if found.endswith("ies") and len(found) > 4:
        return f"{found[:-3]}y"
    if not found.endswith("ss"):
        ending = next((e for e in _ENDINGS if found.endswith(e) and len(found) - len(e) >= 3), "")
        found = found.removesuffix(ending)
        if ending in ("ing", "ed") and found[-1] == found[-2] and found[-1] not in "lsz":  # running, fitted
            found = found[:-1]
    return found.removesuffix("e") if len(found) > 3 else found


_FUNCTION_STEMS = frozenset(stem(word) for word in _FUNCTION_WORDS)
