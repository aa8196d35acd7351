"""Adapters on both LLMs: what trains, what checkpoints hold, what comes out merged."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from hllm_torchrec.checkpoint.load import best_checkpoint
from hllm_torchrec.checkpoint.safe_reader import SafeReader
from hllm_torchrec.config.loading import config_from_file
from hllm_torchrec.config.schema import Config, ConfigError
from hllm_torchrec.distributed.process_group import init_distributed
from hllm_torchrec.distributed.wrappers import full_tensor
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.models.backbones import build_backbone
from hllm_torchrec.models.hllm import HLLM
from hllm_torchrec.modules.lora import adapted_layers, is_adapter, merged
from hllm_torchrec.planning.estimate import HARDWARE, Machine, Workload, estimate
from hllm_torchrec.training.trainer_setup import build_trainer
from hllm_torchrec.weights.export import export_huggingface
from tests.helpers import fixtures, training_fixtures
from tests.helpers.distributed import run_ranks
from tests.helpers.training_fixtures import ITEM_LLAMA, USER_LLAMA

pytest.importorskip("peft")

ITEM_LORA: dict[str, Any] = {"rank": 3, "alpha": 6.0, "dropout": 0.1, "targets": ["q_proj", "v_proj", "down_proj"]}
USER_LORA: dict[str, Any] = {"rank": 2, "alpha": 8.0}


@functools.cache
def pretrained() -> dict[str, Path]:
    """Tiny directories of both LLMs, as if downloaded."""
    folder, found = fixtures.folder() / "pretrained-lora", {}
    for name, shape in (("item", ITEM_LLAMA), ("user", USER_LLAMA)):
        torch.manual_seed(3)
        build_backbone(None, shape).save_pretrained(folder / name)
        found[name] = folder / name
    return found


def settings(output: Path, **more: Any) -> Config:
    """A run with adapters on both LLMs."""
    chosen: dict[str, Any] = {
        "item_llm__shape": None,
        "item_llm__pretrained": pretrained()["item"],
        "item_llm__lora": ITEM_LORA,
        "user__shape": None,
        "user__pretrained": pretrained()["user"],
        "user__lora": USER_LORA,
        "max_steps": 3,
        "objective__generative_weight": 0.5,
    }
    return training_fixtures.config(output, **(chosen | more))


@functools.cache
def trained() -> Path:
    """A run of three steps."""
    run = fixtures.folder() / "lora" / "run"
    training_fixtures.train(settings(run))
    return run


def own_weights(hllm: HLLM) -> dict[str, Tensor]:
    """Copies of all dense weights."""
    return {name: p.detach().clone() for name, p in hllm.named_parameters() if "embedding_bags" not in name}


def test_only_adapters_the_item_vector_and_what_is_no_llm_move(tmp_path: Path) -> None:
    trainer = build_trainer(settings(tmp_path / "run"), init_distributed())
    before = own_weights(trainer.hllm)
    trainer.run()
    moved = {name for name, value in own_weights(trainer.hllm).items() if not torch.equal(value, before[name])}
    of_llms = {name for name in before if ".backbone." in name}
    assert {name for name in of_llms if is_adapter(name)} == moved & of_llms
    assert {"item_llm.item_token", "user_token", "logit_scale.log_scale"} <= moved
    groups = {group["name"]: len(group["params"]) for group in trainer.dense_optim.param_groups}
    # two layers with three adapters of two matrices each; [ITEM] has one dimension
    assert groups["item_llm"] == 12 and groups["item_llm (no decay)"] == 1


def test_the_first_step_sees_the_pretrained_models(tmp_path: Path) -> None:
    adapted = build_trainer(settings(tmp_path / "a"), init_distributed())
    nothing = {"rank": 0}
    plain = build_trainer(settings(tmp_path / "b", item_llm__lora=nothing, user__lora=nothing), init_distributed())
    adapted.hllm.eval(), plain.hllm.eval()
    ids = torch.arange(1, 9)
    assert torch.equal(adapted.hllm.embed_items(ids), plain.hllm.embed_items(ids))
    x, offsets = torch.randn(7, 24), torch.tensor([0, 3, 7])
    assert torch.equal(adapted.hllm.user(x, offsets)[0], plain.hllm.user(x, offsets)[0])
    others = {n: p for n, p in plain.hllm.named_parameters() if ".backbone." not in n}
    mine = dict(adapted.hllm.named_parameters())
    assert all(torch.equal(mine[name], p) for name, p in others.items())


def test_checkpoints_leave_out_what_the_directories_hold() -> None:
    checkpoint = best_checkpoint(trained() / "checkpoints")
    assert checkpoint is not None
    keys = [key for key in SafeReader(checkpoint).read_tensors() if ".backbone." in key]
    assert keys and all(is_adapter(key) for key in keys)
    assert set(json.loads((checkpoint / "extra.json").read_text())["bases"]) == {"item_llm", "user"}


def test_adapters_on_random_weights_are_saved_with_them(tmp_path: Path) -> None:
    more = {"item_llm__shape": ITEM_LLAMA, "item_llm__pretrained": None, "max_steps": 1}
    training_fixtures.train(settings(tmp_path / "run", **more))
    checkpoint = best_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    keys = SafeReader(checkpoint).read_tensors()
    assert "model.item_llm.backbone.layers.0.self_attn.q_proj.base_layer.weight" in keys


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path: Path) -> None:
    full_tensor = training_fixtures.train(settings(tmp_path / "whole", evaluation__checkpoint_every=2))
    training_fixtures.interrupted(tmp_path / "whole", tmp_path / "again", 2)
    onward = settings(tmp_path / "again", evaluation__checkpoint_every=2, resume=True)
    resumed = training_fixtures.train(onward)
    training_fixtures.assert_equal_weights(training_fixtures.weights(resumed), training_fixtures.weights(full_tensor))


def test_other_weights_under_the_adapters_are_noticed(tmp_path: Path) -> None:
    torch.manual_seed(4)
    other = build_backbone(None, ITEM_LLAMA)
    other.save_pretrained(tmp_path / "other")
    config = settings(trained(), item_llm__pretrained=tmp_path / "other")
    with pytest.raises(ValueError, match="other weights than those now in item_llm.pretrained, .*/other: restore"):
        load_run(trained(), "best", init_distributed(), config)


def test_merged_equals_unmerged_and_leaves_no_trace() -> None:
    loaded = load_run(trained(), "best", init_distributed())
    hllm = loaded.experiment.hllm.eval()
    before = own_weights(hllm)
    x, offsets = torch.randn(7, 24), torch.tensor([0, 3, 7])
    with torch.no_grad():
        items, users = hllm.embed_items(torch.arange(20)), hllm.user(x, offsets)[0]
        with merged(hllm):
            assert all(layer.merged for layer in adapted_layers(hllm))
            torch.testing.assert_close(hllm.embed_items(torch.arange(20)), items, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(hllm.user(x, offsets)[0], users, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in own_weights(hllm).items())
    with torch.no_grad():
        for layer in adapted_layers(hllm):
            layer.lora_B["default"].weight.zero_()
        assert (hllm.embed_items(torch.arange(20)) - items).abs().max() > 1e-4  # the adapters had something to say


def test_exported_directories_are_plain_and_give_the_runs_embeddings(tmp_path: Path) -> None:
    export_huggingface(trained(), "best", tmp_path / "out", init_distributed())
    names = {part: set(load_file(tmp_path / "out" / part / "model.safetensors")) for part in ("item_llm", "user_llm")}
    assert not any("lora" in name or "base_layer" in name for found in names.values() for name in found)
    loaded = load_run(trained(), "best", init_distributed())
    experiment, hllm = loaded.experiment, loaded.experiment.hllm.eval()
    assert experiment.item_encoder is not None
    model = AutoModel.from_pretrained(tmp_path / "out" / "item_llm").eval()
    token = load_file(tmp_path / "out" / "item_llm" / "item_token.safetensors")["item_token"]
    with torch.no_grad():
        ours = hllm.embed_items(torch.tensor([1, 2, 3]))
        for row, item in enumerate((1, 2, 3)):
            ids, _ = experiment.item_encoder.tokens.gather(torch.tensor([item]).numpy())
            words = model.get_input_embeddings()(torch.from_numpy(ids).long())
            theirs = model(inputs_embeds=torch.cat([words, token[None]])[None]).last_hidden_state[0, -1]
            torch.testing.assert_close(ours[row], theirs, rtol=1e-5, atol=1e-5)
        x = torch.randn(5, hllm.user.width)
        user = AutoModel.from_pretrained(tmp_path / "out" / "user_llm").eval()
        theirs = user(inputs_embeds=x[None]).last_hidden_state[0]
        torch.testing.assert_close(hllm.user(x, torch.tensor([0, 5]))[0], theirs, rtol=1e-5, atol=1e-5)
    onward = config_from_file(tmp_path / "out" / "config.yaml")
    assert onward.item_llm.lora.rank == onward.user.lora.rank == 0
    assert "through adapters of rank 3 and merged" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"item_llm__lora": {"rank": 2, "targets": ["q_prj"]}}, r"item_llm.lora.targets: 'q_prj': llama .*'q_proj'\?"),
        ({"user__lora": {"rank": 2, "targets": ["fc1"]}}, "user.lora.targets: 'fc1': .*; it has down_proj, gate_proj"),
    ],
)
def test_a_target_that_is_not_there_is_named_with_its_nearest(
    tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_trainer(settings(tmp_path / "run", **more), init_distributed())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"item_llm__trainable": False}, "item_llm.lora.rank: 3 while item_llm.trainable is false"),
        ({"user__trainable": False}, "user.lora.rank: 2 while user.trainable is false"),
        ({"item_llm__enabled": False}, "item_llm.lora.rank: 3 while item_llm.enabled is false"),
        (
            {"user__encoder": "sasrec", "user__pretrained": None, "user__shape": {"width": 8, "layers": 1}},
            "user.lora.rank: 2: user.encoder 'sasrec' is not a Hugging Face decoder",
        ),
        ({"item_llm__lora": {"targets": ["q_proj"]}}, "item_llm.lora.rank: 0, but other fields"),
        ({"item_llm__lora": {"rank": 2, "alpha": 0}}, "item_llm.lora.alpha: 0.0: must be > 0"),
        ({"item_llm__lora": {"rnk": 2}}, r"item_llm.lora.rnk: unknown key \(did you mean 'rank'\?\)"),
    ],
)
def test_settings_that_contradict_adapters_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path / "run", **more)


@pytest.mark.slow
def test_a_plan_counts_gradients_and_optimizer_states_of_adapters_alone() -> None:
    machine = Machine(1, 1, **HARDWARE["h100"])
    work, tables = Workload(1000, 1000, 20.0, 20.0), {"item_id": 1001}
    lora = estimate(settings(Path("runs/x")), work, machine, tables)
    nothing = {"rank": 0}
    plain = estimate(settings(Path("runs/x"), item_llm__lora=nothing, user__lora=nothing), work, machine, tables)
    item = 2 * 3 * (16 + 16 + 16 + 8 + 24 + 16)  # layers x rank x (in + out) of q, v and down
    own = sum(p.numel() for p in AutoModel.from_pretrained(pretrained()["item"]).parameters())
    saved = (plain.memory["gradients"] - lora.memory["gradients"]) / 4
    user = AutoModel.from_pretrained(pretrained()["user"])
    words = user.get_input_embeddings().weight.numel()
    in_and_out = sum(m.in_features + m.out_features for m in user.modules() if isinstance(m, torch.nn.Linear))
    assert saved == own + sum(p.numel() for p in user.parameters()) - words - item - 2 * in_and_out
    assert lora.memory["optimizer"] == 2 * lora.memory["gradients"]
    assert lora.memory["weights"] > plain.memory["weights"]
    assert lora.seconds["compute"] < plain.seconds["compute"]


def _sharded(config: Config) -> dict[str, Tensor]:
    """On a rank: what the LLMs' weights are after training."""
    trainer = training_fixtures.train(config)
    return {
        name: full_tensor(p.detach()).clone() for name, p in trainer.hllm.named_parameters() if ".backbone." in name
    }


@pytest.mark.slow
def test_two_ranks_train_the_adapters_as_one_does_under_ddp_and_fsdp(tmp_path: Path) -> None:
    def of(name: str, users: int, dense: str) -> Config:
        exact = {"item_llm__lora": ITEM_LORA | {"dropout": 0.0}, "max_steps": 2}
        again = dense == "fsdp"  # as configs/paper/books_hllm_7b_lora.yaml has it; the numbers are the same
        parts = {"parallel__dense": dense, "parallel__activation_checkpointing": again}
        return settings(tmp_path / name, **exact, data__batch_users=users, **parts)

    (one,) = run_ranks(_sharded, 1, of("one", 8, "ddp"))
    start = build_trainer(of("start", 8, "ddp"), init_distributed()).hllm
    assert all(is_adapter(n) != torch.equal(value, start.get_parameter(n)) for n, value in one.items())
    for dense in ("ddp", "fsdp"):
        for found in run_ranks(_sharded, 2, of(dense, 4, dense)):
            assert found.keys() == one.keys()
            for name, value in found.items():
                torch.testing.assert_close(value, one[name], rtol=1e-3, atol=1e-4, msg=name)
