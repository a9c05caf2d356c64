"""The invariants of docs/invariants.md hold at every stop of random runs."""

from __future__ import annotations

from hypothesis import given

from effort import examples
from simulation.invariants import Books, check_totals, check_work
from simulation.scenarios import Player, Scenario, is_stuck, scenarios


def play_checked(scenario: Scenario, *, stepping: bool = False) -> tuple[Player, Books]:
    player = Player(scenario, stepping)
    books = Books(player.fleet)
    books.feed(range(len(scenario.rows)), [row.arrival for row in scenario.rows])
    disruptive = scenario.touches("num_gpu_blocks", "block_size", "async_scheduling", "kv_cache_dtype")

    def look(player: Player) -> None:
        books.visit(player.fleet, settled=disruptive, failed=scenario.has("fail"), resumed_from=player.resumed_from)

    player.play(look)
    fleet = player.fleet
    if not is_stuck(fleet):
        assert fleet.idle
        assert len(books.ended) == len(scenario.rows)
    if not scenario.has("fail"):
        check_totals(fleet, books.outcomes())
    return player, books


@examples(100)
@given(scenarios())
def test_plain(scenario: Scenario) -> None:
    player, books = play_checked(scenario)
    check_work(player.fleet, books.outcomes())


@examples(100)
@given(scenarios(control=True))
def test_control(scenario: Scenario) -> None:
    play_checked(scenario)
