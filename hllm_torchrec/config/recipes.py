"""Recipes: settings of a task that follow from what is in a dataset, each with its reason.

A configuration with `recipe: ranking` (configs/recipes/ranking.yaml) holds what does not depend on the data. What does
is chosen here from `DatasetFacts`; a value that the file or an option sets stays as it is.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

ENCODER = ".cache/models/all-minilm-l6-v2"
"""Sentence encoder of the recipes, relative to the current folder, as `hllm fetch minilm` puts it."""
TEXT_LENGTHS = (32, 64, 128, 256)
"""Values of item_llm.max_text_length; the encoder was trained on texts of at most 256 tokens."""
TOKENS_PER_WORD = 1.5
MANY_USERS = 16_384
"""Users from which a retrieval model's steps read four times as many of them."""
EVENTS_READ = 1_600_000
"""Events that the epochs of a retrieval model read in all, at least 4 and at most 32 epochs."""
TEXT_SIMILARITY = 0.6
"""Weight of the texts' cosine beside the learned one in a retrieval model."""
TRANSITIONS = 0.2
"""Weight of the transitions of items beside the learned cosine in a retrieval model."""
EVIDENCE = ("factors", "items", "users", "neighbors", "tastes", "crosses")
"""Groups of data.evidence; neighbors need texts."""
RARE_BELOW = 20
"""Training events per item below which text and evidence stand for items, without IDs."""
SMALL_TABLE = 5_000
"""Values up to which a categorical user feature is read: a feature with more is an id of the user in disguise."""


@dataclass(frozen=True)
class DatasetFacts:
    """What the choices depend on.

    users, items, exposures: numbers of the training part (items: of the catalogue); labels: numbers of training
    exposures with label 0 and 1; graded: True if actions have different numbers (ratings); words: 95th percentile of
    an item's words, by text column; item_features, user_features: number of values of each categorical feature.
    """

    users: int
    items: int
    exposures: int
    labels: tuple[int, int]
    graded: bool
    words: dict[str, float] = field(default_factory=dict)
    item_features: dict[str, int] = field(default_factory=dict)
    user_features: dict[str, int] = field(default_factory=dict)
    split: str = ""


@dataclass(frozen=True)
class Choice:
    """Value of a dotted field of the configuration, and why."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.value)}, chosen because {self.reason}"

    def as_mapping(self) -> dict[str, Any]:
        """The value as the content of a configuration file."""
        content = self.value
        for part in reversed(self.name.split(".")):
            content = {part: content}
        return dict(content)


def ranking(facts: DatasetFacts) -> Iterator[Choice]:
    """Choices for a ranking model: text, IDs and evidence of simple predictors.

    Raises:
        ValueError: all labels are equal, so there is nothing to rank.
    """
    if 0 in facts.labels:
        only = int(facts.labels[0] == 0)
        raise ValueError(
            f"recipe: ranking: all {facts.exposures:,} training exposures have label {only}: a ranking model needs "
            "both; use the recipe retrieval, or name the column of labels when the dataset is prepared"
        )
    yield from text_choices(facts)
    yield from feature_choices(facts)
    has_text = any(facts.words.values())
    groups = [name for name in EVIDENCE if has_text or name != "neighbors"]
    yield Choice("data.evidence", groups, f"items have {'texts' if has_text else 'no texts'} to compare")
    yield from id_choices(facts, has_text)
    if facts.graded:
        yield Choice("objective.value_weight", 0.5, "actions have different numbers (ratings), which say more")


def retrieval(facts: DatasetFacts) -> Iterator[Choice]:
    """Choices for next-item prediction over the catalogue: text and IDs, or IDs alone."""
    yield from text_choices(facts)
    if any(facts.words.values()):
        yield Choice("objective.text_similarity", TEXT_SIMILARITY, "items have texts to compare")
    yield Choice("objective.transitions", TRANSITIONS, "they are solved in seconds and complement what is learned")
    if facts.item_features:
        names = list(facts.item_features)
        yield Choice("data.item_features", names, f"items have {', '.join(names)}")
    size = 32 if facts.users < MANY_USERS else 128
    yield Choice("data.batch_users", size, f"there are {facts.users:,} users; larger steps are faster")
    epochs = min(max(round(EVENTS_READ / max(facts.exposures, 1)), 4), 32)
    stages = [{"name": "cached items" if any(facts.words.values()) else "ids", "epochs": epochs}]
    if any(facts.words.values()):
        stages[0]["item_embeddings"] = "cached"
    yield Choice("stages", stages, f"there are {facts.exposures:,} training events; patience may end it earlier")
    if facts.split == "leave_one_out":
        yield Choice("evaluation.protocol", "leave_one_out", "the dataset was split so")
    else:
        yield Choice("evaluation.retrieval", True, f"the dataset was split by {facts.split or 'another rule'}")


def id_choices(facts: DatasetFacts, has_text: bool) -> Iterator[Choice]:
    """IDs and item factors where items have enough events to learn them from."""
    events = facts.exposures / max(facts.items, 1)
    known = events >= RARE_BELOW
    why = f"an item has {events:.0f} training events on average, {'enough' if known else 'too few'} to learn its ID"
    stands_in = "" if known or has_text else "items have no texts that could stand for them"
    yield Choice("features.item_id", known or not has_text, stands_in or why)
    yield Choice("data.item_vectors", ["factors"] if known else [], why)


def text_choices(facts: DatasetFacts) -> Iterator[Choice]:
    """Text columns and length of an item's text; an ID-only model without texts."""
    used = {name: words for name, words in facts.words.items() if words > 0}
    if not used:
        yield Choice("item_llm.enabled", False, "no item has a text")
        return
    yield Choice("item_llm.text_keys", list(used), f"items have text in {', '.join(used)}")
    tokens = TOKENS_PER_WORD * (sum(used.values()) + 2 * len(used))
    length = next((n for n in TEXT_LENGTHS if tokens <= n), TEXT_LENGTHS[-1])
    yield Choice("item_llm.max_text_length", length, f"19 of 20 texts have at most {sum(used.values()):.0f} words")


def feature_choices(facts: DatasetFacts) -> Iterator[Choice]:
    """Categorical features of items and users that exist."""
    if facts.item_features:
        names = list(facts.item_features)
        yield Choice("data.item_features", names, f"items have {', '.join(names)}")
    small = [name for name, size in facts.user_features.items() if size <= SMALL_TABLE]
    if small:
        yield Choice("data.user_features", small, f"users have {', '.join(small)}, of at most {SMALL_TABLE:,} values")


RECIPES: dict[str, Callable[[DatasetFacts], Iterator[Choice]]] = {"ranking": ranking, "retrieval": retrieval}
"""Choices of each value of `recipe`."""


def recipe_choices(task: str, facts: DatasetFacts, given: dict[str, Any]) -> list[Choice]:
    """Choices of a recipe, without those of fields that `given`, the content of files and options, sets.

    Raises:
        ValueError: the dataset does not fit the task.
    """
    return [choice for choice in RECIPES[task](facts) if not has_value(given, choice.name)]


def has_value(content: Any, name: str) -> bool:
    """True if the content of a configuration file sets a dotted field."""
    for part in name.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def value_at(content: Any, name: str) -> Any:
    """The value of a dotted field that it sets."""
    for part in name.split("."):
        content = content[part]
    return content


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
