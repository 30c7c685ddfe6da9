"""Scripted runs with faults at random moments: `make faults` plays 200 of them, `make test` a few.

`SEED=` says which, and is printed; a run that failed is played again by `make faults SEED=S ONLY=NUMBER`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from support.fault_bed import FaultBed
from support.fault_scenario import draw, play, prepare

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SEED = os.environ.get("FAL_FAULT_SEED", "1")
RUNS = int(os.environ.get("FAL_FAULT_RUNS", "4"))
ONLY = os.environ.get("FAL_FAULT_ONLY", "")
LONGEST_CUT = 2.0 if RUNS < 50 and not ONLY else 60.0  # seconds

NUMBERS = [int(ONLY)] if ONLY else list(range(RUNS))


@pytest.fixture(scope="module")
def fault_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultBed]:
    bed = FaultBed(tmp_path_factory.mktemp("faults"))
    prepare(bed, tmp_path_factory.mktemp("prepare"))
    yield bed
    bed.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", NUMBERS)
def test_nothing_is_lost(
    fault_bed: FaultBed, number: int, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    scenario = draw(f"{SEED}-{number}", fault_bed.can, longest_cut=LONGEST_CUT)
    play(fault_bed, scenario, tmp_path)

    record_property("faults", sorted({count for count, _ in scenario.found}))
    if scenario.found:
        pytest.fail(f"make faults SEED={SEED} ONLY={number}: {scenario}", pytrace=False)
