"""What each kind of fusion has; the names are those of configurations."""

from typing import get_args, get_type_hints

import pytest

from hllm_torchrec.config.objective import ObjectiveConfig
from hllm_torchrec.modules.fusion import Fusion


@pytest.mark.parametrize(
    ("name", "has_queries", "query_is_target", "query_is_user"),
    [("none", False, False, False), ("early", True, True, False), ("late", True, False, True)],
)
def test_a_fusion_says_what_its_query_is(
    name: str, has_queries: bool, query_is_target: bool, query_is_user: bool
) -> None:
    fusion = Fusion(name)
    assert (fusion.has_queries, fusion.query_is_target, fusion.query_is_user) == (
        has_queries,
        query_is_target,
        query_is_user,
    )
    assert ObjectiveConfig(fusion=name).has_head is has_queries  # type: ignore[arg-type]


def test_configurations_name_all_of_them() -> None:
    assert set(get_args(get_type_hints(ObjectiveConfig)["fusion"])) == {str(fusion) for fusion in Fusion}
