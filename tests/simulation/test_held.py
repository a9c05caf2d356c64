"""Ends that come from outside, beside requests that end by themselves: the invariants hold at every stop."""

from __future__ import annotations

from hypothesis import given

from effort import examples
from simulation.scenarios import Scenario, scenarios
from simulation.test_properties import play_checked


@examples(150)
@given(scenarios(held=True, kinds=("finish", "finish_any", "output", "let_go", "fork")))
def test_ends_from_outside(scenario: Scenario) -> None:
    play_checked(scenario)


@examples(50)
@given(scenarios(held=True, kinds=("finish", "finish_any", "output", "let_go", "fork")))
def test_ends_from_outside_step_by_step(scenario: Scenario) -> None:
    play_checked(scenario, stepping=True)
