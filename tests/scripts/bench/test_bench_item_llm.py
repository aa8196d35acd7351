"""The bench of the Item LLM, on tiny shapes: its sides agree, and its products are those of the model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import fixtures
from tests.helpers.scripts import bench_module

bench = bench_module("bench_item_llm")


def test_the_products_are_those_of_the_model() -> None:
    """As many operations as torch counts in the linear maps, and the attention's over padded buckets."""
    side = bench.Side(fixtures.token_store(), torch.arange(40), fixtures.LLAMA, share=True)
    products = bench.products(side, fixtures.LLAMA)
    with FlopCounterMode(display=False) as ours:
        products()
    with FlopCounterMode(display=False) as theirs:
        side()
    counted, expected = (counter.get_flop_counts()["Global"] for counter in (ours, theirs))
    assert counted[torch.ops.aten.mm] == expected[torch.ops.aten.mm]
    cells = sum(b.texts * b.longest * (b.seen + b.longest) for b in side.plan().buckets)
    assert (
        counted[torch.ops.aten.bmm]
        == 6 * 2 * cells * fixtures.LLAMA["hidden_size"] * fixtures.LLAMA["num_hidden_layers"]
    )


@pytest.mark.slow
def test_a_tiny_run_reports_every_ratio() -> None:
    dataset, tokenizer = str(fixtures.dataset().root), str(fixtures.tokenizer_dir())
    given = ["--dataset", dataset, "--tokenizer", tokenizer, "--keys", "title", "brand"]
    result = bench.run(bench.parse([*given, "--tiny", "--items", "12", "--profile"]))
    names = {"item_llm_matmul_share_fp32", "item_llm_matmul_share_bf16", "prefix_sharing", "compile", "read_rows_alone"}
    assert names <= result["ratios"].keys()
    assert all(value is None or value > 0 for value in result["ratios"].values())
    assert (result["ratios"]["item_llm_matmul_share_bf16"] is None) == (result["bf16"] is not None)
    shares = result["operators"]["shared"]
    assert any(name.startswith("aten::") for name in shares) and sum(shares.values()) == pytest.approx(1)
    assert result["shapes"]["tokens"]["shared"] < result["shapes"]["tokens"]["plain"]
