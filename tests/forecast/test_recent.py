from __future__ import annotations

import numpy as np
import pytest

from forecast.streams import HASH_TOKENS, chat_stream
from kavier_twin.forecast.recent import read_stream
from kavier_twin.simulation.workload import Workload, make_workload, take_rows


def true_previous(workload: Workload) -> list[int]:
    last: dict[int, int] = {}
    previous = []
    for row, session in enumerate(workload.session.tolist()):
        previous.append(last.get(session, -1))
        last[session] = row
    return previous


def without_labels(workload: Workload) -> Workload:
    return workload._replace(session=-1 - np.arange(workload.index.size))


@pytest.mark.parametrize("labelled", [True, False])
def test_turns_are_found_with_and_without_session_labels(labelled: bool) -> None:
    workload = chat_stream(5, 200.0)
    stream = read_stream(workload if labelled else without_labels(workload))
    truth = np.array(true_previous(workload))
    # A message below a hash's grain leaves no trace of its own.
    assert (stream.previous == truth).mean() > (0.999 if labelled else 0.95)
    newer = truth[truth.size // 2 :]
    assert stream.return_ratio == pytest.approx((newer >= 0).mean(), abs=0.05)


def test_a_first_turn_shares_its_system_prompt_and_no_more() -> None:
    stream = read_stream(chat_stream(5, 200.0, systems=1))
    first = np.flatnonzero(stream.previous < 0)
    assert stream.known[first[0]] == 0
    assert set(stream.known[first[1:]].tolist()) == {8}


def test_a_next_turn_knows_all_that_was_said() -> None:
    workload = chat_stream(5, 200.0)
    stream = read_stream(workload)
    turns = np.flatnonzero(stream.previous >= 0)
    before = stream.previous[turns]
    said = (workload.prompt[before] + workload.output[before]) // HASH_TOKENS
    assert (stream.known[turns] == said).all()
    assert stream.covers_output


def test_a_repeated_prompt_is_a_first_turn_that_shares_everything() -> None:
    workload = make_workload(
        [0.0, 1.0, 2.0], 64, 10, chain=[1, 2, 3, 4] * 3, chain_starts=[0, 4, 8, 12], hash_tokens=16, covered=64
    )
    stream = read_stream(workload)
    assert stream.previous.tolist() == [-1, -1, -1]
    assert stream.known.tolist() == [0, 4, 4]


def test_prompts_that_are_hardly_more_than_a_system_prompt_are_not_taken_for_a_session() -> None:
    # One coarse key each holds only the system prompt; the messages behind it are below its grain.
    workload = make_workload(
        [0.0, 1.0, 2.0, 3.0],
        [520, 530, 540, 550],
        10,
        chain=[7, 7, 7, 7],
        chain_starts=[0, 1, 2, 3, 4],
        hash_tokens=512,
        covered=512,
        session=[-1, -2, -3, -4],
    )
    assert read_stream(workload).previous.tolist()[2:] == [-1, -1]


def test_a_key_that_covers_its_block_in_part_is_not_kept() -> None:
    workload = make_workload([0.0], 600, 10, chain=[1, 2], chain_starts=[0, 2], hash_tokens=512, covered=600)
    assert read_stream(workload).full_keys.tolist() == [1]


def test_no_requests() -> None:
    stream = read_stream(make_workload([], [], []))
    assert stream.return_ratio == 0.0
    assert not stream.weight.size


def test_returns_are_counted_as_a_window_without_a_beginning_would_show_them() -> None:
    """Sessions pause for long: of a short window most next turns have their past before it."""
    workload = chat_stream(6, 2_000.0, think_seconds=60.0)
    window = take_rows(workload, np.flatnonzero((workload.arrival >= 1_000.0) & (workload.arrival < 1_250.0)))
    truth = (np.array(true_previous(workload)) >= 0)[workload.arrival >= 1_000.0].mean()
    stream = read_stream(window)
    assert stream.returns.mean() < truth - 0.1
    assert stream.return_ratio == pytest.approx(truth, abs=0.06)


def test_a_prefix_of_many_first_turns_is_steady_and_one_asked_for_in_a_hurry_is_not() -> None:
    times, chains = [], []
    for second in range(100):
        times.append(float(second))
        chains.append([7, 100 + second])  # a system prompt
        if 40 <= second < 46:
            times.append(second + 0.5)
            chains.append([8, 200 + second])  # a document that many read within seconds
    starts = np.concatenate([[0], np.cumsum([len(chain) for chain in chains])])
    workload = make_workload(
        times, 40, 10, chain=[key for chain in chains for key in chain], chain_starts=starts, hash_tokens=16, covered=32
    )
    stream = read_stream(workload)
    document = np.array([chain[0] == 8 for chain in chains])
    assert (stream.steady[~document] == 1).all()
    assert not stream.returns[~document].any()
    assert not stream.steady[document].any()
    assert stream.returns[document].tolist() == [False] + [True] * 5
    assert not stream.contained.any()
