"""tools.bench: a small step of each kind runs, alone and beside another checkout."""
import re

import pytest
from helpers import attempt, refused, ROOT
from tools import bench


def cells(result):
    """The numbers of each row of what was printed."""
    rows = re.findall(r"\n\| (?!step)[^|]*\|([^\n]*)\|", result.ok().out)
    return [[float(cell.replace(",", "")) for cell in row.split("|")] for row in rows]


STEPS = ("clipfit size=tiny-vit batch=2", "contrastive size=tiny-vit batch=4 micro_batch=2",
         "features size=tiny-vit count=8 what=images", "features size=tiny-vit count=8",
         "distill batch=2 teacher=stored", "tokenizer count=9", "decoding count=1",
         "loss count=64", "search count=2")


@pytest.mark.parametrize("step", STEPS)
def test_steps_run(step):
    bench.prepare(step)()


def test_a_table_has_seconds_ratios_and_memory(tmp_path):
    rows = cells(attempt(bench, "tokenizer count=9", "loss count=64", "--rounds", 1))
    assert len(rows) == 2 and all(len(row) == 5 and row[1:4] == [1, 1, 1] for row in rows)
    for odd in ("tokenizer words=9", "speed"):  # a step's argument, a table
        refused(attempt(bench, odd), odd)
    refused(attempt(bench, "before", tmp_path), "before")


def test_another_checkout_runs_beside_this_one(monkeypatch):
    monkeypatch.setattr(bench, "BEFORE", ("tokenizer count=20",))
    rows = cells(attempt(bench, "before", ROOT, "--rounds", 2))
    assert len(rows) == 4 and all(low <= middle <= high for _, middle, low, high, _ in rows)
