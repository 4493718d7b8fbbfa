"""Kernel launches and synchronisations of the LM head, counted: what each tile, chunk and call adds."""

import sys
from pathlib import Path

import pytest

from rpo_kernels.head import evaluation_plan

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import host_costs


@pytest.fixture
def counts(available_backend):
    """A function of the numbers of tiles and chunks: costs of a forward and of its backward."""
    if available_backend("triton")[1] != "cpu":
        pytest.skip("counted from torch's operators and Triton's calls under the interpreter")
    return host_costs.costs


@pytest.mark.parametrize(
    "options, forward, backward",
    [
        (dict(), 3, 2),  # logits, P, P W; hidden states scaled, the weight's gradient
        (dict(weight=False), 3, 0),
        (dict(hidden=False, weight=False), 2, 0),  # logits, statistics
    ],
    ids=["trained", "frozen", "evaluated"],
)
def test_launches_a_tile(counts, options, forward, backward):
    few, many = counts(3, 1, **options), counts(7, 1, **options)
    assert (many[0].launches - few[0].launches) / 4 == forward
    assert (many[1].launches - few[1].launches) / 4 == backward


def test_launches_without_gradients_on_a_narrow_head(counts, monkeypatch):
    """Rows gathered, the product, the merging of its blocks: three a chunk, whatever the vocabulary."""
    monkeypatch.setattr(evaluation_plan, "pays", lambda *_: True)
    monkeypatch.setattr(evaluation_plan, "CHUNK_ROWS", 16)
    few, more, many = (counts(*size, hidden=False, weight=False)[0].launches for size in ((3, 1), (7, 1), (3, 5)))
    assert few == more
    assert (many - few) / 4 == 3


def test_host_waits_once_a_forward_and_never_in_backward(counts):
    for tiles, chunks in ((3, 1), (5, 2)):
        assert [cost.waits for cost in counts(tiles, chunks)] == [1, 0]
        # A filter's backward waits for its columns, and for where each tile's begin.
        assert counts(tiles, chunks, gradient_filter=2.0**-10)[0].waits == 1


def test_launches_a_call(counts):
    """Beyond tiles: what an empty walk would still cost. Printed by `pytest -s`."""
    few, many = counts(3, 1), counts(7, 1)
    fixed = [few[i].launches - 3 * (many[i].launches - few[i].launches) / 4 for i in (0, 1)]
    print(f"launches a call beyond its tiles: forward {fixed[0]:.0f}, backward {fixed[1]:.0f}")
    assert fixed[0] <= 18 and fixed[1] <= 12


def test_the_table_of_costs(counts, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(host_costs, "CALLS", dict(trained=dict()))
    monkeypatch.setattr(host_costs, "SAMPLES", 2)
    monkeypatch.setattr(sys, "argv", ["host_costs.py", "--out", str(tmp_path)])
    monkeypatch.setattr(host_costs.torch, "set_num_threads", lambda number: None)
    host_costs.main()
    assert "trained forward" in capsys.readouterr().out
    figures = host_costs.json.loads((tmp_path / "host-costs.json").read_text())
    assert figures["trained forward"]["tile"]["launches"] == 3
    assert "microseconds" in figures["trained backward"]["call"]
