"""Modules and symbols of version 0.1 and their new modules; importing an old one raises an error with the new name.

docs/migration.md contains the same tables; a test compares the two.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NoReturn

PACKAGE = "hllm_torchrec"

#: Old module -> new module, both below `hllm_torchrec`.
MODULES = {
    "baselines.config": "baselines.settings",
    "baselines.dlrm": "downstream.dlrm",
    "baselines.dlrm_data": "downstream.dlrm_data",
    "baselines.exposures": "data.histories",
    "baselines.retrieval": "baselines.retrieval_baselines",
    "baselines.run": "baselines.runner",
    "bases": "models.lora_base",
    "checkout": "_source_layout",
    "checkpoint": "checkpoint.load",
    "checkpoint_files": "checkpoint.layout",
    "checkpoint_reader": "checkpoint.safe_reader",
    "checkpoint_state": "checkpoint.state",
    "checkpoint_write": "checkpoint.save",
    "config": "config.schema",
    "config_downstream": "downstream.dlrm_config",
    "config_files": "config.loading",
    "config_keys": "config.checking",
    "config_logs": "config.schema",
    "config_lora": "config.lora",
    "config_reliability": "config.schema",
    "config_rules": "config.rules",
    "data.atomic": "common.atomic_files",
    "data.catalogue": "data.item_catalogue",
    "data.checked": "data.validation",
    "data.factors": "data.item_factors",
    "data.fetch": "data.quickstart_files",
    "data.manifest_fields": "data.manifest_schema",
    "data.numeric": "data.numeric_features",
    "data.partition": "data.event_partitions",
    "data.policy": "data.bad_rows",
    "data.ragged": "data.jagged_arrays",
    "data.recipe": "data.batch_spec",
    "data.sources.table": "data.sources.table_mapping",
    "data.tokens": "data.token_store",
    "data.users": "data.user_table",
    "downstream": "downstream.comparison",
    "embed": "inference.item_embedding",
    "embed_users": "inference.user_embedding",
    "errors": "common.errors",
    "evaluate": "evaluation.scoring",
    "exchange": "distributed.collectives",
    "experiment": "models.assembly",
    "export": "weights.export",
    "exposure_store": "inference.exposure_store",
    "exposure_vectors": "inference.exposure_vectors",
    "flops": "models.flops",
    "frozen": "models.stored_items",
    "hf_weights": "weights.huggingface",
    "item_index": "inference.item_index",
    "items": "models.item_encoder",
    "joining": "distributed.rendezvous",
    "keeper": "checkpoint.manager",
    "kept": "planning.activations",
    "known_shapes": "planning.model_configs",
    "launch.command": "launch.entry",
    "launch.prediction_files": "launch.evaluate_options",
    "logs": "common.run_log",
    "meter": "training.throughput",
    "metrics.approximate": "metrics.approximate_auc",
    "metrics.cautions": "evaluation.sanity_checks",
    "metrics.compare": "evaluation.model_comparison",
    "metrics.exact": "metrics.exact_auc",
    "metrics.exchange": "distributed.array_collectives",
    "metrics.files": "evaluation.prediction_files",
    "metrics.gate": "evaluation.regression_gate",
    "metrics.grouped": "metrics.group_auc",
    "metrics.inputs": "metrics.input_checks",
    "metrics.job": "evaluation.offline_evaluation",
    "metrics.outputs": "evaluation.sinks",
    "metrics.page": "evaluation.report",
    "metrics.paired": "metrics.delong",
    "metrics.plots": "evaluation.report_figures",
    "metrics.ranking": "metrics.registry",
    "metrics.retrieval": "metrics.retrieval_metrics",
    "metrics.retrieval_table": "evaluation.retrieval_comparison",
    "metrics.rows": "evaluation.prediction_rows",
    "metrics.schema": "evaluation.metrics_schema",
    "metrics.sections": "evaluation.report_sections",
    "metrics.sharded_ranks": "metrics.distributed_ranking",
    "metrics.sorted_runs": "metrics.score_chunks",
    "metrics.users": "metrics.user_statistics",
    "model": "models.hllm",
    "modules.adapter": "modules.features.adapter",
    "modules.attention": "modules.attention.packed",
    "modules.attention_backends": "modules.attention.text_backends",
    "modules.encoder_shapes": "modules.encoders.shapes",
    "modules.frozen_items": "modules.features.frozen_items",
    "modules.hstu": "modules.hstu.layer",
    "modules.hstu_kernels": "modules.hstu.triton_kernels",
    "modules.hstu_triton": "modules.hstu.triton_backend",
    "modules.hybrid_features": "modules.features.hybrid",
    "modules.item_llm": "modules.encoders.item_llm",
    "modules.last_rows": "modules.attention.last_layer",
    "modules.ligr": "modules.encoders.ligr",
    "modules.losses": "modules.losses.objectives",
    "modules.pointwise_attention": "modules.hstu.attention",
    "modules.pointwise_blocks": "modules.hstu.eager",
    "modules.pointwise_layout": "modules.hstu.layout",
    "modules.pointwise_plan": "modules.hstu.blocks",
    "modules.prediction_head": "modules.heads",
    "modules.sampled_bce": "modules.losses.sampled_bce",
    "modules.sasrec": "modules.encoders.sasrec",
    "modules.self_attention": "modules.encoders.softmax",
    "modules.standardise": "modules.features.standardize",
    "modules.text_attention": "modules.attention.text",
    "modules.timestamps": "modules.features.timestamps",
    "modules.user_encoder": "modules.encoders.base",
    "modules.user_llm": "modules.encoders.user_llm",
    "offline": "evaluation.run_loader",
    "optim": "training.optim",
    "own_code": "config.extensions",
    "parallelize": "models.parallelize",
    "plan": "planning.estimate",
    "plan_traffic": "planning.traffic",
    "plugin": "downstream.plugin",
    "preemption": "distributed.preemption",
    "protocols": "config.eval_protocols",
    "public_weights": "weights.import_hllm",
    "quantised_tables": "inference.quantization",
    "quiet": "common.warning_filters",
    "ranks": "distributed.coordination",
    "recommend": "serving.recommend",
    "remote.datasets": "data.remote_datasets",
    "remote": "common.urls",
    "remote.files": "common.urls",
    "remote.runs": "checkpoint.remote_runs",
    "report": "evaluation.report",
    "resume": "training.resume",
    "retrieval": "evaluation.catalogue_retrieval",
    "schedule": "training.stage_schedule",
    "serving": "serving.scorer",
    "start": "training.warm_start",
    "step_guard": "training.step_guard",
    "step_loss": "training.loss",
    "store.export": "store.export_formats",
    "store.layout": "store.files",
    "store.published": "store.remote_store",
    "store.run": "store.segment",
    "subsample": "models.item_subsampling",
    "table_memory": "embedding.memory",
    "tables_ahead": "embedding.prefetch",
    "trainer": "training.trainer",
    "user_vectors": "inference.user_embedder",
    "versions": "_versions",
    "wandb_log": "training.wandb_sink",
    "yaml_files": "common.yaml_files",
}

#: Old module -> {symbol: new module} for the symbols that did not move to the module in `MODULES`.
SYMBOLS = {
    "remote": {"datasets": "data.remote_datasets", "runs": "checkpoint.remote_runs"},
    "baselines.config": {
        "Way": "downstream.dlrm_config",
        "DLRMConfig": "downstream.dlrm_config",
    },
    "baselines.run": {
        "make_once": "evaluation.cached_predictions",
        "SPLITS": "evaluation.cached_predictions",
    },
    "config": {
        "load_config": "config.loading",
        "save_config": "config.loading",
        "config_from_file": "config.loading",
        "ItemLLMConfig": "config.encoders",
        "UserEncoderConfig": "config.encoders",
        "ObjectiveConfig": "config.objective",
    },
    "config_logs": {
        "check_logs": "training.wandb_sink",
    },
    "config_lora": {
        "LORA_BOUNDS": "config.rules",
        "lora_problems": "config.rules",
    },
    "embed": {
        "item_facts": "models.fingerprint",
        "hash_weights": "models.fingerprint",
    },
    "evaluate": {
        "raw_model": "distributed.wrappers",
        "Columns": "data.predictions",
        "join_columns": "data.predictions",
        "write_predictions": "data.predictions",
        "save_predictions": "data.predictions",
    },
    "experiment": {
        "INIT_ROWS": "embedding.tables",
        "initialise_tables": "embedding.tables",
        "base_rate": "data.dataset",
    },
    "export": {
        "put_together": "embedding.tables",
    },
    "flops": {
        "transformer_flops_per_token": "modules.encoders.backbone",
    },
    "logs": {
        "machine_info": "common.machine",
        "peak_memory_bytes": "common.machine",
        "progress": "common.progress",
    },
    "meter": {
        "backbone_flops": "modules.encoders.backbone",
    },
    "metrics.compare": {
        "Predictions": "data.predictions",
        "read_predictions": "data.predictions",
    },
    "metrics.exchange": {
        "common_splitters": "metrics.score_chunks",
    },
    "metrics.grouped": {
        "mix": "common.hashing",
    },
    "model": {
        "HLLMOutput": "models.hllm_output",
        "ENCODERS": "modules.encoders.shapes",
        "build_model": "models.build",
        "build_user_encoder": "models.build",
    },
    "modules.user_llm": {
        "Queries": "modules.encoders.base",
    },
    "modules.item_llm": {
        "trained_item_token": "models.model_files",
        "build_backbone": "models.backbones",
        "ITEM_TOKEN_FILE": "models.model_files",
    },
    "optim": {
        "TableOptimizer": "embedding.optimizers",
        "EmaWeights": "models.ema",
    },
    "parallelize": {
        "start_process": "distributed.process_group",
        "stop_process": "distributed.process_group",
        "process": "distributed.process_group",
        "whole": "distributed.wrappers",
        "NOT_FOR_TABLES": "embedding.sharding",
        "FROZEN_COLUMNS": "embedding.sharding",
        "check_tables": "embedding.sharding",
        "distribute": "embedding.sharding",
        "shard_frozen_items": "embedding.sharding",
        "plan_tables": "embedding.sharding",
        "table_constraints": "embedding.sharding",
        "hardware_of": "embedding.sharding",
        "place_tables": "embedding.sharding",
        "TableSettings": "embedding.optimizers",
        "give_sharded_tables_an_optimizer": "embedding.optimizers",
    },
    "table_memory": {
        "TableOptimizerKind": "config.table_optimizers",
        "TABLE_OPTIMIZERS": "config.table_optimizers",
        "REPLICATED": "config.table_optimizers",
    },
}


class MovedFinder(MetaPathFinder):
    """Meta path finder, placed after the finder of `sys.path`: raises an error for a module that has moved."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return None for every name that is not a module of version 0.1, so that the import continues as usual.

        Raises:
            ModuleNotFoundError: `fullname` is a module of version 0.1; the message names the new module.
        """
        old = fullname.removeprefix(f"{PACKAGE}.")
        if old != fullname and old in MODULES:
            refuse(old)
        return None


def refuse(old: str) -> NoReturn:
    """Raise the ModuleNotFoundError for a module of version 0.1."""
    others = sorted({f"{PACKAGE}.{new}" for new in SYMBOLS.get(old, {}).values()})
    also = f", and some of its names are in {', '.join(others)}" if others else ""
    raise ModuleNotFoundError(
        f"{PACKAGE}.{old} is now {PACKAGE}.{MODULES[old]}{also}: docs/migration.md lists all that moved",
        name=f"{PACKAGE}.{old}",
    )


def install_finder() -> None:
    """Install the finder unless it is installed already."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.insert(sys.meta_path.index(PathFinder) + 1, MovedFinder())
