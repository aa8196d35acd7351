"""Assembly of an experiment from a configuration and a dataset: batch spec, token stores, model, encoders.

Training and the offline evaluation job build their parts here, so that both score with the same inputs.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from hllm_torchrec.common.errors import ConfigError
from hllm_torchrec.common.seconds import second_of
from hllm_torchrec.common.urls import url_of
from hllm_torchrec.config.encoders import ItemLLMConfig
from hllm_torchrec.config.eval_protocols import dataset_problems
from hllm_torchrec.config.rules import takes_stored_items
from hllm_torchrec.config.schema import Config
from hllm_torchrec.data.batch_spec import BatchSpec, check_batch_spec
from hllm_torchrec.data.dataset import Dataset, base_rate
from hllm_torchrec.data.derived_files import derived_path
from hllm_torchrec.data.evidence import EvidenceModel, evidence_problems
from hllm_torchrec.data.item_factors import FACTORS, item_vectors
from hllm_torchrec.data.request_context import RequestContext, fit_context
from hllm_torchrec.data.run_factors import RunFactors
from hllm_torchrec.data.token_store import TokenStore, build_token_store
from hllm_torchrec.data.transitions import Transitions
from hllm_torchrec.distributed.coordination import run_on_each_host
from hllm_torchrec.embedding.tables import initialize_tables
from hllm_torchrec.models.build import build_model
from hllm_torchrec.models.creative_inputs import CreativeInputs
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.models.hllm import HLLM, ContextInputs, item_space
from hllm_torchrec.models.item_encoder import ItemEncoder
from hllm_torchrec.models.item_source import LiveItems
from hllm_torchrec.models.item_subsampling import SubsampledEncoder
from hllm_torchrec.models.lora_base import base_fingerprints
from hllm_torchrec.models.model_files import ADAPTER, WEIGHTS
from hllm_torchrec.models.named_backbones import backbone_sections, text_sections
from hllm_torchrec.models.parallelize import parallelize
from hllm_torchrec.models.run_evidence import frozen_catalogue, open_evidence, reads_texts
from hllm_torchrec.models.run_transitions import compares_texts, open_transitions, transition_similarity
from hllm_torchrec.models.tasks import fit_tasks, is_single, resolve_tasks, task_problems
from hllm_torchrec.models.text_format import text_format
from hllm_torchrec.modules.encoders.backbone import learned_positions
from hllm_torchrec.modules.encoders.item_llm import ItemLLM
from hllm_torchrec.modules.fusion import Fusion


def build_experiment(
    config: Config,
    device: torch.device,
    *,
    factors: RunFactors | None = None,
    evidence: EvidenceModel | None = None,
    transitions: Transitions | None = None,
    version: int | None = None,
    encode: bool = True,
) -> Experiment:
    """Open the dataset, tokenize texts that are not yet tokenized, build and parallelize the model. Collective.

    Args:
        factors: item factors of the run; None: if the configuration uses factors, those in the dataset's folder.
        evidence: fitted evidence of the run; None: it is fitted if the configuration uses evidence.
        transitions: fitted transitions of the run; None: they are fitted if the configuration uses transitions.
        version: version of the dataset to read; None: `data.version`.
        encode: False: do not encode items now; evidence that reads texts lacks them until `read_catalogue` is called.

    Raises:
        ConfigError: the configuration does not fit the dataset or the device.
    """
    dataset = Dataset.open(Path(config.data.dataset), version or config.data.version)
    spec = batch_spec_of(config, dataset)
    _check_configuration(config, dataset, spec)
    tokens = {name: open_token_store(section, dataset, name) for name, section in text_sections(config)}
    torch.manual_seed(config.seed)  # the same initial dense weights on all ranks
    vectors = _item_vectors(config, dataset, factors)
    model, context = _build_model(config, dataset, spec, vectors)
    encoders, live = _build_encoders(config, model, tokens, device)
    creatives = CreativeInputs.open(config, dataset, model)
    catalogue = None
    if encode and (reads_texts(config) or (compares_texts(config) and transitions is None)):
        catalogue = frozen_catalogue(model, encoders.get("item_llm"), live, device)
    found = open_evidence(config, dataset, catalogue, evidence)
    flow = open_transitions(config, dataset, catalogue, transitions)
    if flow is not None:
        model.transitions = transition_similarity(config, flow, device)
    if found is not None and evidence is None:
        model.head.initialize_evidence(torch.from_numpy(found.model.weights), found.model.intercept)
    bases = base_fingerprints(model, config)  # before FSDP shards the weights
    wrapped = parallelize(model, config, device)
    initialize_tables(wrapped, config.seed, config.features.init_scale)
    torch.manual_seed(config.seed * 1_000_003 + dist.get_rank() + 1)  # dropout differs between ranks
    return Experiment(
        config,
        dataset,
        spec,
        device,
        wrapped,
        encoders,
        live,
        vectors,
        bases,
        factors,
        found,
        context,
        catalogue,
        creatives,
        flow,
    )


def _check_configuration(config: Config, dataset: Dataset, spec: BatchSpec) -> None:
    """Raise ConfigError with all problems of the configuration on this dataset."""
    problems = [
        *task_problems(config.objective.task_configs, dataset.schema),
        *check_batch_spec(spec, dataset),
        *evidence_problems(config.data.evidence),
        *_missing_models(config),
        *dataset_problems(config, dataset.manifest),
    ]
    if problems:
        raise ConfigError(problems)


def _build_model(
    config: Config, dataset: Dataset, spec: BatchSpec, vectors: NDArray[np.float32] | None
) -> tuple[HLLM, RequestContext | None]:
    """(model, context of requests or None); constants such as the base rate are computed from the training part."""
    since = second_of(config.data.train_since or 0)
    tasks = resolve_tasks(config.objective.task_configs, dataset.schema)
    if spec.tasks:
        tasks = fit_tasks(tasks, dataset, since)
    rate, context, inputs = base_rate(dataset, since), None, None
    if config.data.drawn_negatives.count:
        rate = 1 / max(dataset.num_items - 1, 2)  # probability of an item in one choice from the catalogue
    if spec.context or spec.bias:
        context, inputs = _context(dataset, spec, since)
    width = 0 if vectors is None else vectors.shape[1]
    model = build_model(config, spec.tables(dataset), rate, torch.device("meta"), width, tasks, inputs)
    return model, context


def _build_encoders(
    config: Config, model: HLLM, tokens: dict[str, TokenStore], device: torch.device
) -> tuple[dict[str, ItemEncoder], LiveItems | None]:
    """(encoders of the parts that read text, source of live item embeddings); sets the model's `item_source`."""
    encoders = {
        name: _text_encoder(name, section, tokens[name], getattr(model, name), device)
        for name, section in text_sections(config)
    }
    share, encoder, live = config.item_llm.trained_share, encoders.get("item_llm"), None
    if encoder is not None and model.item_llm is not None:
        sampled = SubsampledEncoder(encoder, share, config.item_llm.refresh_after, config.seed) if share < 1 else None
        live = LiveItems(model.item_llm, sampled or encoder)
    if not takes_stored_items(config):
        model.item_source = live
    problems = [problem for name in encoders for problem in _vocabulary_problems(model, name, encoders[name])]
    if problems:
        raise ConfigError(problems)
    return encoders, live


def _context(dataset: Dataset, spec: BatchSpec, since: int) -> tuple[RequestContext, ContextInputs]:
    """(context of the batch spec, its scales and table sizes for the model)."""
    context, scales = fit_context(dataset, spec.context + spec.bias, since)
    return context, ContextInputs(scales.tolist(), {name: dataset.schema.sizes[name] for name in spec.bias})


def _text_encoder(
    name: str, section: ItemLLMConfig, tokens: TokenStore, llm: ItemLLM, device: torch.device
) -> ItemEncoder:
    quantizes = section.quantization == "int8"
    if quantizes and device.type != "cpu":
        raise ConfigError(f"{name}.quantization: int8: its kernels run on a CPU, and this is {device.type}; write none")
    shares_prefix = section.share_prefix and llm.shares_prefix
    return ItemEncoder(tokens, device, shares_prefix, section.items_at_once, name, quantizes=quantizes)


def batch_spec_of(config: Config, dataset: Dataset) -> BatchSpec:
    """Return the batch spec of a configuration: the contents of its batches."""
    generates, objective = config.objective.generates, config.objective
    named = objective.task_configs
    tasks = () if task_problems(named, dataset.schema) else resolve_tasks(named, dataset.schema)
    return BatchSpec(
        fusion=Fusion(config.objective.fusion),
        history=config.data.history,
        visibility=dataset.visibility,
        feedback_delay=config.data.feedback_delay,
        negatives=config.objective.negatives if generates else 0,
        item_slots=generates and item_space(config) == "features",
        positive_targets_only=config.objective.positive_targets_only,
        item_id=config.features.item_id,
        action=config.features.action,
        action_gate=config.features.action_gate,
        time_depth=config.features.time_depth,
        item_features=config.data.item_features,
        user_features=config.data.user_features,
        numeric_features=config.data.numeric_features,
        id_dropout=config.data.id_dropout,
        interleaved=config.user.actions == "interleaved",
        cold_dropout=config.data.cold_dropout,
        context=config.data.context,
        bias=objective.position_bias,
        tasks=() if not tasks or is_single(tasks, objective) else tuple(task.name for task in tasks),
        negative_rate=config.data.negative_rate,
    )


def _item_vectors(config: Config, dataset: Dataset, factors: RunFactors | None) -> NDArray[np.float32] | None:
    """[N, V] all dense item features, concatenated, or None; fits factors that do not exist yet. Collective."""
    names = config.data.item_vectors

    def read(name: str) -> NDArray[np.float32]:
        if name == FACTORS and factors is not None:
            return factors.fold_in(dataset).vectors()
        return item_vectors(dataset, name)

    # One process of each host fits missing factors; the other processes then read its files.
    run_on_each_host(lambda: [item_vectors(dataset, name).shape for name in names if name != FACTORS or not factors])
    if not names:
        return None
    vectors = np.concatenate([read(name) for name in names], axis=1)
    if config.data.cold_dropout:
        vectors[dataset.training_item_counts() == 0] = 0
    return vectors


def _missing_models(config: Config) -> Iterator[str]:
    """Yield a message for a missing item store and each missing pretrained model.

    Checked here because Hugging Face would search for a missing directory on the network.
    """
    store = config.item_llm.store
    if store is not None and url_of(store) is None and not (Path(store) / "store.json").is_file():
        yield f"item_llm.store: {store}: no embedding store (no store.json); make it with `hllm embed --items {store}`"
    for part, section in backbone_sections(config):
        directory = section.pretrained
        # An adapter is refused when the model is read.
        if directory is not None and not any((Path(directory) / name).is_file() for name in ("config.json", ADAPTER)):
            yield (
                f"{part}.pretrained: {directory}: not a Hugging Face directory (no config.json); "
                f"{_other_directory(Path(directory))}"
            )


def _other_directory(directory: Path) -> str:
    """Remedy for a directory without a model; sentence-transformers once kept the model in a folder of it."""
    inside = sorted(path.parent for path in directory.glob("*/config.json") if (path.parent / WEIGHTS).is_file())
    if not inside:
        return "download one (`hllm fetch --help` names two)"
    return f"its model is in {inside[0]}: give that folder, and set pooling and normalize as the others say"


def open_token_store(item: ItemLLMConfig, dataset: Dataset, name: str = "item_llm") -> TokenStore:
    """Open the token store of the dataset's items for an LLM; build it if it does not exist. Collective.

    name: name of the section `item` of the configuration.

    Raises:
        ConfigError: the section has no tokenizer.
    """
    tokenizer = item.tokenizer or item.pretrained
    if tokenizer is None:
        raise ConfigError(f"{name}.tokenizer: none: an Item LLM from scratch still needs a tokenizer directory")

    form = text_format(name, item)

    def build() -> Path:
        return build_token_store(
            dataset,
            tokenizer,
            prompt=form.prompt,
            keys=list(item.text_keys),
            max_text_length=item.max_text_length,
            separator=item.separator,
            keep_end=form.keeps_end,
        )

    first = run_on_each_host(build)
    own = derived_path(dataset, "tokens", first.name)  # without a shared disk, hosts may have different paths
    return TokenStore.open(own if own.is_dir() else first)


def _vocabulary_problems(model: HLLM, name: str, encoder: ItemEncoder) -> Iterator[str]:
    """Yield a message if token ids or positions exceed the LLM's embedding tables (the lookup would crash)."""
    llm: ItemLLM = getattr(model, name)
    words, tokens = llm.backbone.get_input_embeddings().num_embeddings, encoder.tokens.facts["vocab_size"]
    if tokens > words:
        yield (
            f"{name}.tokenizer: makes token ids up to {tokens - 1}, but the Item LLM has {words} word vectors: give "
            "the tokenizer of that model, or a shape with a larger vocab_size"
        )
    learned = learned_positions(llm.backbone)
    # The first rows of OPT's position table (its offset) are never used, although they are not padding.
    used = llm.first_position + getattr(learned, "offset", 0)
    positions = math.inf if learned is None else learned.num_embeddings - used
    appended = int(llm.pooling == "item")
    longest = int(encoder.tokens.lengths.max())
    if longest + appended > positions:
        yield (
            f"{name}.max_text_length: the longest text has {longest} tokens{', and [ITEM] follows' * appended}, but "
            f"the Item LLM has {positions} position vectors: at most {positions - appended}"
        )
