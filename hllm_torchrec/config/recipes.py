"""Recipes: settings of a task that are chosen from the contents of the dataset, each with a reason.

A configuration file with `recipe: ranking` (configs/recipes/ranking.yaml) contains the settings that do not depend on
the data. The other settings are chosen here from `DatasetFacts`, unless the file or an option sets them.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hllm_torchrec.config.rules import OWN_TABLES

ENCODER = ".cache/models/all-minilm-l6-v2"
"""Sentence encoder of the recipes: path relative to the current folder, to which `hllm fetch minilm` downloads it."""
TEXT_LENGTHS = (32, 64, 128, 256)
"""Possible values of item_llm.max_text_length; the encoder is made for texts of at most 256 tokens."""
TOKENS_PER_WORD = 1.5
MANY_USERS = 16_384
"""From this number of training users on, data.batch_users of a retrieval model is 128 instead of 32."""
EVENTS_READ = 1_600_000
"""Events that a retrieval model should read over all epochs; the number of epochs is limited to 4 to 32."""
TEXT_SIMILARITY = 0.6
"""objective.text_similarity of a retrieval model."""
TRANSITIONS = 0.2
"""objective.transitions of a retrieval model."""
EVIDENCE = ("factors", "items", "users", "neighbors", "tastes", "crosses")
"""Groups of data.evidence; neighbors need texts."""
FEW_USERS = 20
"""Minimum number of training users for evidence: its predictors need other users to be fitted on."""
RARE_BELOW = 20
"""Mean number of training events per item below which text and evidence are used without item IDs."""
SMALL_TABLE = 5_000
"""Maximum number of values of a user feature; a feature with more values probably identifies the user."""


@dataclass(frozen=True)
class DatasetFacts:
    """Properties of a dataset from which settings are chosen.

    users, exposures: numbers in the training part; items: number in the catalogue; labels: numbers of training
    exposures with label 0 and 1; graded: True if actions have different values (ratings); words: text column -> 95th
    percentile of the number of words of an item (0 if all texts are equal); item_features, user_features: categorical
    feature -> number of values; split: rule by which the dataset was split.
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
    """Value that a recipe chooses for a dotted field of the configuration, and the reason."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {_shown(self.value)}, chosen because {self.reason}"

    def as_mapping(self) -> dict[str, Any]:
        """Return the choice as the content of a configuration file: nested mappings."""
        content = self.value
        for part in reversed(self.name.split(".")):
            content = {part: content}
        return dict(content)


def ranking(facts: DatasetFacts) -> Iterator[Choice]:
    """Yield the choices for a ranking model: text, IDs and the evidence of simple predictors.

    Raises:
        ValueError: all labels are equal, so a ranking cannot be learned.
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
    if facts.users < FEW_USERS:
        yield Choice("data.evidence", [], f"there are only {facts.users} users to fit it on")
    else:
        yield Choice("data.evidence", groups, f"items have {'texts' if has_text else 'no texts'} to compare")
    yield from id_choices(facts, has_text)
    if facts.graded:
        why = "actions have different numbers (ratings), which carry more information than a 0/1 label"
        yield Choice("objective.value_weight", 0.5, why)


def retrieval(facts: DatasetFacts) -> Iterator[Choice]:
    """Yield the choices for next-item prediction over the catalogue, with text and IDs, or with IDs only."""
    yield from text_choices(facts)
    if any(facts.words.values()):
        yield Choice("objective.text_similarity", TEXT_SIMILARITY, "items have texts to compare")
    yield Choice("objective.transitions", TRANSITIONS, "they are solved in seconds and complement what is learned")
    yield from item_feature_choices(facts)
    size = 32 if facts.users < MANY_USERS else 128
    why = "which is enough for larger, faster steps" if size > 32 else "too few for larger steps"
    yield Choice("data.batch_users", size, f"there are {facts.users:,} users, {why}")
    epochs = min(max(round(EVENTS_READ / max(facts.exposures, 1)), 4), 32)
    stages = [{"name": "cached items" if any(facts.words.values()) else "ids", "epochs": epochs}]
    if any(facts.words.values()):
        stages[0]["item_embeddings"] = "cached"
    yield Choice("stages", stages, f"there are {facts.exposures:,} training events; patience may end training earlier")
    if facts.split == "leave_one_out":
        yield Choice("evaluation.protocol", "leave_one_out", "the dataset was split by leave_one_out")
    else:
        yield Choice("evaluation.retrieval", True, f"the dataset was split by {facts.split or 'another rule'}")


def id_choices(facts: DatasetFacts, has_text: bool) -> Iterator[Choice]:
    """Yield the choices of item IDs and item factors.

    Both are used if items have enough events to learn them from; IDs are also used if items have no texts.
    """
    events = facts.exposures / max(facts.items, 1)
    enough = events >= RARE_BELOW
    why = f"an item has {events:.0f} training events on average, {'enough' if enough else 'too few'} to learn its ID"
    no_alternative = "" if enough or has_text else "items have no texts that could replace IDs"
    yield Choice("features.item_id", enough or not has_text, no_alternative or why)
    yield Choice("data.item_vectors", ["factors"] if enough else [], why)


def text_choices(facts: DatasetFacts) -> Iterator[Choice]:
    """Yield the text columns and the maximum length of an item's text; if there are no texts, an ID-only model."""
    used = {name: words for name, words in facts.words.items() if words > 0}
    if not used:
        yield Choice("item_llm.enabled", False, "items have no texts, or all have the same text")
        return
    yield Choice("item_llm.text_keys", list(used), f"items have text in {', '.join(used)}")
    tokens = TOKENS_PER_WORD * (sum(used.values()) + 2 * len(used))
    length = next((n for n in TEXT_LENGTHS if tokens <= n), TEXT_LENGTHS[-1])
    yield Choice(
        "item_llm.max_text_length", length, f"the columns' 95th percentiles are {sum(used.values()):.0f} words in total"
    )


def feature_choices(facts: DatasetFacts) -> Iterator[Choice]:
    """Yield the categorical features of items and users that the dataset has."""
    yield from item_feature_choices(facts)
    small = [name for name, size in facts.user_features.items() if size <= SMALL_TABLE]
    if small:
        names, others = _named_tables(small)
        why = f"users have {', '.join(small)}, of at most {SMALL_TABLE:,} values{others}"
        yield Choice("data.user_features", names, why)


def item_feature_choices(facts: DatasetFacts) -> Iterator[Choice]:
    """Yield the categorical features of items that the dataset has."""
    if facts.item_features:
        names, others = _named_tables(facts.item_features)
        yield Choice("data.item_features", names, f"items have {', '.join(facts.item_features)}{others}")


def _named_tables(features: Iterable[str]) -> tuple[list[str], str]:
    """Return the features whose name is a valid name of a table, and a remark about the others."""
    names: list[str] = []
    others: list[str] = []
    for name in features:
        (others if name in OWN_TABLES or "." in name else names).append(name)
    return names, f"; {', '.join(others)} cannot name a table: rename the column" if others else ""


RECIPES: dict[str, Callable[[DatasetFacts], Iterator[Choice]]] = {"ranking": ranking, "retrieval": retrieval}
"""`recipe` -> function that yields its choices."""


# Two extreme datasets: every field that a recipe can choose is chosen for one of them.
_RICH = DatasetFacts(
    10**6, 100, 10**6, (1, 1), True, {"title": 9.0}, {"genre": 9}, {"country": 9}, split="leave_one_out"
)
_POOR = DatasetFacts(1, 10**6, 2, (1, 1), False)


def chosen_fields(task: str) -> list[str]:
    """Return all dotted fields that a recipe chooses for some dataset."""
    return list(dict.fromkeys(choice.name for facts in (_RICH, _POOR) for choice in RECIPES[task](facts)))


def choices_of_run(task: str, saved: dict[str, Any], given: dict[str, Any]) -> list[Choice]:
    """Return a recipe's choices as saved in the configuration of a run, except for fields that `given` sets.

    A resumed run needs these, because the recipe might choose other values or fields for the present dataset. A field
    that `saved` lacks, because a later version added it, keeps its default.
    """
    names = [name for name in chosen_fields(task) if has_value(saved, name) and not has_value(given, name)]
    return [Choice(name, value_at(saved, name), "the resumed run has it") for name in names]


def recipe_choices(task: str, facts: DatasetFacts, given: dict[str, Any]) -> list[Choice]:
    """Return the choices of a recipe, except for fields that `given`, the content of files and options, sets.

    Raises:
        ValueError: the dataset is not suitable for the task.
    """
    return [choice for choice in RECIPES[task](facts) if not has_value(given, choice.name)]


def has_value(content: Any, name: str) -> bool:
    """Return True if the content of a configuration file sets a dotted field."""
    for part in name.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def value_at(content: Any, name: str) -> Any:
    """Return the value of a dotted field, which the content must set."""
    for part in name.split("."):
        content = content[part]
    return content


def _shown(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
