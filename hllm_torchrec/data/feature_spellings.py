"""Values of categorical features that are one value in two spellings: tables of other types write `22` as `22.0` or
`true` as `1`, and each spelling would get an id of its own, which no run has learned.
"""

import re
from collections.abc import Mapping

from hllm_torchrec.data.bad_rows import BadRowLog
from hllm_torchrec.data.item_catalogue import Vocabulary

_WHOLE, _FLOAT = re.compile(r"-?\d+"), re.compile(r"-?\d+\.0+")
_TRUTH = {
    **dict.fromkeys(("true", "t", "yes", "y", "1", "1.0"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0", "0.0"), False),
}


def check_spellings(words: Mapping[str, Vocabulary], log: BadRowLog) -> list[str]:
    """Notes on the new values of features that a dataset already has.

    Raises:
        ValueError: more than the policy's largest share of the new values are other spellings of values before them.
    """
    notes = []
    for name, vocabulary in words.items():
        new = vocabulary.values[vocabulary.known :]
        pairs = other_spellings(vocabulary.values, vocabulary.known)
        limit = log.policy.largest_share
        if len(pairs) > limit * len(new):
            value, earlier = pairs[0]
            raise ValueError(
                f"feature {name}: {len(pairs):,} of {len(new):,} new values are other spellings of one value, such as "
                f"{value!r} of {earlier!r}: a column of another type (integers, floats, booleans) writes them so; "
                "write them as before, or allow it (--bad-share 1)"
            )
        if new and vocabulary.known:
            notes.append(f"feature {name}: {len(new):,} new values, e.g. {new[0][:40]!r}")
    return notes


def other_spellings(values: list[str], known: int) -> list[tuple[str, str]]:
    """Pairs (new value, other value) of one number or truth value; the first `known` values are not new.

    Empty if some value has a fraction, since `2` and `2.0` can be two values among `2.1`. `1` and `true` are a pair
    only if all values are truth values.
    """
    if not any(value[:1] == "-" or value[:1].isdigit() or value.lower() in _TRUTH for value in values[known:]):
        return []
    first: dict[str | bool, str] = {}
    pairs = []
    truth = all(value.strip().lower() in _TRUTH for value in values)
    for number, value in enumerate(values):
        if truth:
            form: str | bool = _TRUTH[value.strip().lower()]
        elif _FLOAT.fullmatch(value):
            form = value.partition(".")[0]
        elif _WHOLE.fullmatch(value):
            form = value
        elif re.fullmatch(r"-?\d*\.\d+", value):
            return []
        else:
            continue
        earlier = first.setdefault(form, value)
        if number >= known and earlier != value:
            pairs.append((value, earlier))
    return pairs
