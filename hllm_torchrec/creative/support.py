"""Lexical support of a text: whether each of its numbers, names and content words occurs in the facts of an item.

Words are compared without case, accents and inflectional endings. This finds words that no fact contains. It does not
find a wrong combination of words that the facts contain, such as `Tom Hanks` from `Tom Cruise` and `Colin Hanks`.
Negations count as content words, because `no sugar` is not supported by `sugar`. The list of function words is English;
for other languages the caller passes allowed words. Chinese and Japanese texts, which have no spaces, are compared by
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
"""English function words, and nouns that address the reader of a text."""
_ENDINGS = ("ing", "ed", "es", "s")


@dataclass(frozen=True)
class Support:
    """Result of `support`.

    words: number of content words of a text, including numbers and names; missing: content words that occur in no fact,
    in the order and spelling of the text.
    """

    words: int
    missing: tuple[str, ...]

    @property
    def share(self) -> float:
        """Share of the content words that are supported; 1 for a text without content words."""
        return 1.0 - len(self.missing) / self.words if self.words else 1.0


def support(text: str, facts: Iterable[str], allowed: Iterable[str] = ()) -> Support:
    """Search the facts for each number, name and content word of `text`.

    Args:
        facts: texts of the item, such as its title and description.
        allowed: further words that the text may contain.
    """
    known = {stem(word) for fact in (*facts, *allowed) for word in words(fact)}
    content = content_words(text)
    return Support(len(content), tuple(word for word in content if stem(word) not in known))


def content_words(text: str) -> list[str]:
    """Words and numbers of a text, except function words, in their order."""
    return [word for word in words(text) if stem(word) not in _FUNCTION_STEMS]


def words(text: str) -> list[str]:
    """Words and numbers of a text in their order, without accents."""
    plain = unicodedata.normalize("NFKD", text.replace("’", "'"))
    # NFKD also decomposes kana with voicing marks and Hangul syllables, which NFC composes again.
    bare = "".join(c for c in plain if not "\u0300" <= c <= "\u036f")
    return _WORD.findall(unicodedata.normalize("NFC", bare))


def stem(word: str) -> str:
    """Stem of a word in lower case, which is the same for `Fights`, `fighting` and `fight`; `1,000` becomes `1000`."""
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
