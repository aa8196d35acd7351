"""A setting that a message asks for is accepted, by the configuration, by the model or by a training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.distributed.process_group import destroy_distributed, init_distributed
from hllm_torchrec.models.assembly import build_experiment
from tests.docs.remedy_world import pattern, run, world
from tests.helpers import fixtures
from tests.helpers.training_fixtures import ITEM_LLAMA, USER_LLAMA, config, train

HSTU = {"width": 24, "layers": 1, "heads": 2}
SASREC = {"width": 24, "layers": 1, "heads": 2, "max_positions": 64}
STORED = [{"name": "II", "epochs": 1, "item_embeddings": "stored"}]
ID_ONLY = {"item_llm__enabled": False}
Settings = dict[str, Any]

CONFIGURATIONS: list[tuple[str, Settings, Settings]] = [
    # (part of the message, what provokes it, what the remedy adds)
    ("must be □ under evaluation.protocol □", {"evaluation__protocol": "leave_one_out"},
   {"objective__positive_targets_only": False}),
    ("data.□: □ is the name of another table of the model", {"data__item_features": ["action"]},
     {"data__item_features": []}),
    ("data.□: □: the name of a table has no dot: leave it out", {"data__user_features": ["geo.country"]},
     {"data__user_features": []}),
    ("evaluation.every: □: must be at least the □ epochs of all stages, with evaluation.patience 0",
     {"data__train_part": "train_and_valid", "evaluation__every": 0.5}, {"evaluation__every": 1}),
    ("user.encoder: □: must be one of □, or □□", {"user__encoder": "lm"}, {"user__encoder": "llm"}),
    ("features.new_rows: 'neighbors': items have neither text nor features",
     {"features__new_rows": "neighbors", "data__item_features": [], **ID_ONLY}, {"features__new_rows": "unknown"}),
    ("data.stochastic_length: □: must be 0 (off), or above 1", {"data__stochastic_length": 0.5},
     {"data__stochastic_length": 1.6}),
    ("optim.betas: □: each must be", {"optim__betas": [1.0, 0.9]}, {"optim__betas": [0.9, 0.98]}),
    ("data.evidence: □: objective.fusion 'none' has no head",
     {"data__evidence": ["items"], "objective__fusion": "none"}, {"data__evidence": []}),
    ("data.evidence: 'neighbors' compares texts", {"data__evidence": ["neighbors"], **ID_ONLY}, {"data__evidence": []}),
    ("data.evidence: '□' needs text embeddings that do not change", {"data__evidence": ["neighbors"]},
     {"item_llm__trainable": False}),
    ("item_llm.quantization: □: quantized weights cannot be trained", {"item_llm__quantization": "int8"},
     {"item_llm__trainable": False}),
    ("int8 needs float32 inputs and unsharded weights",
     {"item_llm__quantization": "int8", "item_llm__trainable": False, "parallel__precision": "bf16"},
     {"parallel__precision": "fp32"}),
    (": adapters are not quantized; write 0, or none",
     {"item_llm__quantization": "int8", "item_llm__trainable": False, "item_llm__lora": {"rank": 4}},
     {"item_llm__lora": {"rank": 0}}),
    ("item_llm.standardise: true with item_llm.whiten", {"item_llm__standardise": True, "item_llm__whiten": True},
   {"item_llm__standardise": False}),
    ("objective.text_similarity: □: needs an Item LLM, objective.item_space features",
     {"objective__text_similarity": 0.6, "objective__generative_weight": 0.1}, {"objective__item_space": "features"}),
    ("objective.text_similarity: action tokens have no text", {"objective__text_similarity": 0.6,
     "objective__generative_weight": 0.1, "objective__item_space": "features", "user__actions": "interleaved"},
   {"user__actions": "summed"}),
    ("item_llm.enabled: false while stages have item_embeddings: stored", {"stages": STORED, **ID_ONLY},
     {"stages": [{"name": "I", "epochs": 1}]}),
    ("item_llm.store: none: item_embeddings: stored needs the store", {"stages": STORED}, {"item_llm__store": "ITEMS"}),
    (", or item_llm.enabled: false for a model without texts", {"item_llm__shape": None}, ID_ONLY),
    ("user.actions: 'interleaved' while features.action is false",
     {"user__actions": "interleaved", "features__action": False}, {"features__action": True}),
    ("user.actions: 'interleaved' with features.action_gate",
     {"user__actions": "interleaved", "features__action_gate": True}, {"features__action_gate": False}),
    ("user.□: □: only for user.encoder llm; leave it out",
     {"user__encoder": "hstu", "user__shape": HSTU, "user__layers": 1}, {"user__layers": None}),
    ("user.shape.max_positions: □: must be at least the longest history",
     {"user__encoder": "sasrec", "user__shape": SASREC | {"max_positions": 8}}, {"user__shape": SASREC}),
    ("user.shape.count_from: 'end': only with objective.fusion none",
     {"user__encoder": "sasrec", "user__shape": SASREC | {"count_from": "end"}},
     {"user__shape": SASREC | {"count_from": "start"}}),
    ("user.shape.time_of: 'next': only with objective.fusion none",
     {"user__encoder": "hstu", "user__shape": HSTU | {"time_of": "next"}},
     {"user__shape": HSTU | {"time_of": "event"}}),
    ("objective.mask_cosine_above: □: only for generative_loss infonce",
     {"objective__mask_cosine_above": 0.99, "objective__generative_loss": "bce"},
     {"objective__mask_cosine_above": None}),
    ("features.item_id: false while item_llm.enabled is false", {"features__item_id": False, **ID_ONLY},
     {"features__item_id": True}),
    ("objective.item_space: 'text' while item_llm.enabled is false",
     {"objective__item_space": "text", "objective__generative_weight": 1, **ID_ONLY},
     {"objective__item_space": "features"}),
    ("evaluation.retrieval: true without a generative loss", {"evaluation__retrieval": True},
     {"objective__generative_weight": 0.1}),
    ("evaluation.ks: □: give at least one K",
     {"evaluation__retrieval": True, "objective__generative_weight": 1, "evaluation__ks": []},
     {"evaluation__ks": [1]}),
    ("item_llm.lora.rank: □ while item_llm.enabled is false", {"item_llm__lora": {"rank": 4}, **ID_ONLY},
     {"item_llm__lora": {"rank": 0}}),
    ("user.lora.rank: □: user.encoder □ is not a Hugging Face decoder",
     {"user__encoder": "hstu", "user__shape": HSTU, "user__lora": {"rank": 4}}, {"user__lora": {"rank": 0}}),
    ("data.train_since: □", {"data__train_since": "yesterday"}, {"data__train_since": "2014-05-20"}),
    ("optim.table_optimizer: □: must be one of □□", {"optim__table_optimizer": "adagrd"},
     {"optim__table_optimizer": "adagrad"}),
    ("optim.table_options.□: no option of □: □", {"optim__table_options": {"bta": 1}}, {"optim__table_options": {}}),
    ("item_llm.standardise: true with item_llm.whiten", {"item_llm__standardise": True, "item_llm__whiten": True},
     {"item_llm__standardise": False}),
    ("objective.tasks: objective.fusion 'none' has no head",
     {"objective__tasks": {"label": {}}, "objective__fusion": "none"}, {"objective__tasks": {}}),
    ("objective.value_weight: □: with objective.tasks the value is a task",
     {"objective__tasks": {"label": {}}, "objective__value_weight": 0.1}, {"objective__tasks": {}}),
    ("objective.classification_weight: 0 without a generative loss", {"objective__classification_weight": 0},
     {"objective__generative_weight": 0.1}),
    ("objective.position_bias: □ is in data.context too",
     {"objective__position_bias": ["slot"], "data__context": ["slot"]}, {"data__context": []}),
    ("objective.position_bias: objective.fusion 'none' has no logit",
     {"objective__position_bias": ["slot"], "objective__fusion": "none"}, {"objective__position_bias": []}),
    ("objective.task_weighting: 'uncertainty' weighs several tasks", {"objective__task_weighting": "uncertainty"},
     {"objective__tasks": {"label": {}, "like": {}}}),
    ("data.train_late_after: needs data.train_since", {"data__train_late_after": 1},
     {"data__train_since": "2014-05-20"}),
    ("data.drawn_negatives.count: objective.fusion 'none' has no head",
     {"data__drawn_negatives": {"count": 4}, "objective__fusion": "none"}, {"data__drawn_negatives": {"count": 0}}),
    ("data.drawn_negatives.count: drawn items have no other labels",
     {"data__drawn_negatives": {"count": 4}, "objective__tasks": {"label": {}}}, {"objective__tasks": {}}),
    ("data.drawn_negatives.by: □: hard negatives need both", {"data__drawn_negatives": {"by": "hard"}},
     {"data__drawn_negatives": {"by": "hard", "item_store": "i", "user_store": "u"}}),
    ("objective.text_similarity: □: needs an Item LLM", {"objective__text_similarity": 0.1},
     {"objective__text_similarity": 0}),
    ("objective.transitions: □: needs objective.item_space features", {"objective__transitions": 0.1},
     {"objective__transitions": 0}),
    ("objective.transitions: action tokens are not items",
     {"objective__transitions": 0.1, "user__actions": "interleaved", "objective__item_space": "features",
      "objective__generative_weight": 0.1}, {"user__actions": "summed"}),
    ("objective.text_similarity: action tokens have no text",
     {"objective__text_similarity": 0.1, "user__actions": "interleaved", "objective__item_space": "features",
      "objective__generative_weight": 0.1}, {"user__actions": "summed"}),
]  # fmt: skip
MODELS: list[tuple[str, Settings, Settings]] = [
    # The same, found when the model is built.
    ("data.numeric_features: □: unknown; there are □", {"data__numeric_features": ["user_meen"]},
     {"data__numeric_features": ["user_mean"]}),
    ("data.evidence: □: unknown; there are □", {"data__evidence": ["item"]}, {"data__evidence": ["items"]}),
    ("data.evidence: □ multiplies columns of other groups: name □ as well", {"data__evidence": ["crosses"]},
     {"data__evidence": ["crosses", "items"]}),
    ("data.item_vectors: □: must be a plain name", {"data__item_vectors": ["../mine"]},
     {"data__item_vectors": ["factors"]}),
    ("data.item_vectors: □: no file □; save a float32 array [□, V] there, or use `factors`",
     {"data__item_vectors": ["mine"]}, {"data__item_vectors": ["factors"]}),
    ("data.drawn_negatives.count: □: the dataset has □ negative exposures", {"data__drawn_negatives": {"count": 4}},
     {"data__drawn_negatives": {"count": 0}}),
    ("optim.table_optimizer: □: FBGEMM has it on CUDA only; on a CPU choose", {"optim__table_optimizer": "adam"},
     {"optim__table_optimizer": "rowwise_adagrad"}),
    ("features.sharding: 'row_wise': TorchRec's CPU tables have no row-wise bags", {"features__sharding": "row_wise"},
     {"features__sharding": "column_wise"}),
    ("parallel.dense: fsdp: □ as □ cannot be packed, and its padded batches differ",
     {"parallel__dense": "fsdp", "item_llm__shape": ITEM_LLAMA | {"model_type": "stablelm"}},
     {"parallel__dense": "ddp"}),
    ("item_llm.store: □: no embedding store (no store.json); make it with `hllm embed --items □`",
     {"stages": STORED, "item_llm__store": "nowhere"}, {"item_llm__store": "ITEMS"}),
    ("data.dataset: □: split by □; evaluation.protocol □ needs one prepared with --split □",
     {"evaluation__protocol": "leave_one_out", "objective__positive_targets_only": False},
     {"data__dataset": "LEAVE_ONE_OUT"}),
    ("□.pretrained: □: not a Hugging Face directory (no config.json); □",
     {"user__pretrained": "nowhere", "user__shape": None}, {"user__pretrained": None, "user__shape": USER_LLAMA}),
]  # fmt: skip


@pytest.fixture(autouse=True)
def own_process_group() -> Iterator[None]:
    yield
    destroy_distributed()


def accept(tmp_path: Path, given: Settings, is_built: bool) -> None:
    """Load the configuration and, if asked, build the model."""
    values = {"data__dataset": world() / "data"} | given
    if values["data__dataset"] == "LEAVE_ONE_OUT":
        values["data__dataset"] = fixtures.dataset("leave_one_out").root
    if values.get("item_llm__store") == "ITEMS":
        values |= {"item_llm__store": run().parent / "items", "objective__generative_weight": 0.1}
    loaded = config(tmp_path / "run", **values)
    if is_built:
        build_experiment(loaded, init_distributed())


SETTINGS = [(*case, case in MODELS) for case in CONFIGURATIONS + MODELS]


@pytest.mark.parametrize(("part", "wrong", "remedy", "is_built"), SETTINGS, ids=[part for part, *_ in SETTINGS])
def test_a_setting_that_a_message_asks_for_is_accepted(
    part: str, wrong: Settings, remedy: Settings, is_built: bool, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, ValueError), match=pattern(part)):
        accept(tmp_path, wrong, is_built)
    destroy_distributed()
    accept(tmp_path, wrong | remedy, is_built)


LEARNING: list[tuple[str, Settings, Settings]] = [
    # (part of the message, settings of a training that provoke it, those that the remedy adds)
    ("the loss is □: lower optim.lr or optim.table_lr, or set optim.clip_norm above 0", {"optim__table_lr": 1e30},
     {"optim__table_lr": 0.01}),
    ("no event since □ (data.train_since)", {"data__train_since": "2090-01-01"}, {"data__train_since": "2014-05-20"}),
]  # fmt: skip


@pytest.mark.parametrize(("part", "wrong", "remedy"), LEARNING, ids=[part for part, *_ in LEARNING])
def test_a_training_that_stops_goes_on_with_what_its_message_asks_for(
    part: str, wrong: Settings, remedy: Settings, tmp_path: Path
) -> None:
    given: Settings = {"data__dataset": world() / "data", "max_steps": 3, **ID_ONLY}
    with pytest.raises((ValueError, FloatingPointError), match=pattern(part)):
        train(config(tmp_path / "wrong", **given | wrong))
    destroy_distributed()
    train(config(tmp_path / "right", **given | wrong | remedy))
