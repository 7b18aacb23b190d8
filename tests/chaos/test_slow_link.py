"""Handovers over a slow link between two network namespaces, through a relay that does harm."""

import pytest

from benchmarks.moving.namespaces import are_possible
from benchmarks.slow_link import QUICK, Condition, measure

pytestmark = pytest.mark.skipif(
    not are_possible(), reason="network namespaces cannot be made here: root, ip and tc are needed"
)
REASONS = {"and a cut": ["broken"], "and a flipped bit": ["corrupt"]}


@pytest.mark.parametrize("condition", QUICK, ids=lambda condition: condition.name)
def test_every_prompt_arrives_whole(condition: Condition) -> None:
    rows = measure(condition)
    assert [row.outcome for row in rows] == ["committed", "committed"], rows
    assert all(row.is_intact for row in rows)
    assert [row.retransfers for row in rows] == [REASONS.get(condition.name, []), []]
