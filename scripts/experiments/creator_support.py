"""Detection rates of the lexical support filter on the descriptions of a dataset's items.

    python scripts/experiments/creator_support.py --dataset data/plots --column plot --texts 2000 --seed 0

A text is the sentence with the most content words of a description that has at least ten content words. The text is
compared with the facts of an item:

    own        the item of the sentence, which supports it (the share of dropped texts must be 0)
    other      another item, chosen at random
    one word   the item of the sentence, but one content word is replaced by a word of another item's description
    negated    the item of the sentence, but "not" is inserted

Prints the share of texts that the filter drops, as JSON. The share of "one word" may be below 1, because the facts may
contain the new word by chance, and the filter accepts an inflected form of a fact's word.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from hllm_torchrec.creative.support import content_words, support
from hllm_torchrec.data.dataset import Dataset

LEAST_WORDS = 10


def drop_rates(descriptions: Sequence[str], titles: Sequence[str], count: int, seed: int) -> dict[str, float]:
    """Compute the share of texts of each kind that the filter drops; also returns the number of texts.

    Args:
        descriptions, titles: texts of the items.
    """
    rng = random.Random(seed)
    items = [i for i, text in enumerate(descriptions) if len(content_words(text)) >= LEAST_WORDS]
    dropped = dict.fromkeys(("own", "other", "one word", "negated"), 0)
    for _ in range(count):
        item, other = rng.sample(items, 2)
        sentences = re.split(r"(?<=[.!?])\s+", descriptions[item])
        sentence = max(sentences, key=lambda text: len(content_words(text)))
        words = [word for word in content_words(sentence) if re.search(rf"\b{re.escape(word)}\b", sentence)]
        chosen = re.escape(rng.choice(words))
        replaced = re.sub(rf"\b{chosen}\b", rng.choice(content_words(descriptions[other])), sentence, count=1)
        at = rng.randrange(1, max(2, len(sentence.split())))
        negated = " ".join([*sentence.split()[:at], "not", *sentence.split()[at:]])
        facts, others = ((titles[i], descriptions[i]) for i in (item, other))
        dropped["own"] += support(sentence, facts).share < 1
        dropped["other"] += support(sentence, others).share < 1
        dropped["one word"] += support(replaced, facts).share < 1
        dropped["negated"] += support(negated, facts).share < 1
    return {"texts": float(count)} | {kind: number / count for kind, number in dropped.items()}


def main(argv: list[str] | None = None) -> int:
    """Print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, metavar="DIR")
    parser.add_argument("--column", default="description", help="text column (default: description)")
    parser.add_argument("--title", default="title", help="text column with titles (default: title)")
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    texts = Dataset.open(args.dataset).text([args.column, args.title])
    found = drop_rates(texts[args.column].to_pylist(), texts[args.title].to_pylist(), args.texts, args.seed)
    print(json.dumps({"dataset": args.dataset.name, "seed": args.seed, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
