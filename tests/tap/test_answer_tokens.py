"""What is taken for an answer's tokens is never more than the engine can have made."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.tap.agreement import Agreement, Estimate
from kavier_twin.tap.answer_tokens import known_tokens, shared
from kavier_twin.tap.exchanges import ChoiceEnd

pieces = st.lists(st.text("ab", max_size=3), min_size=2, max_size=8)


def tokens(made: list[str]) -> tuple[list[int], list[int]]:
    """Ids and ends of tokens with these texts."""
    return list(range(len(made))), list(accumulate(map(len, made)))


@given(pieces)
def test_a_stream_in_the_tokenizers_own_tokens_is_known_up_to_its_last_text(made: list[str]) -> None:
    ids, ends = tokens(made)
    visible = [number + 1 for number, piece in enumerate(made) if piece]
    assert known_tokens(ids, ends, ChoiceEnd(pieces=tuple(made)), len(made)) == max(visible, default=len(made))


@given(pieces, pieces)
def test_tokens_are_known_up_to_where_a_stream_was_cut_otherwise(engines: list[str], ours: list[str]) -> None:
    ids, ends = tokens(ours)
    output_tokens = 100  # so that no equal count helps
    known = known_tokens(ids, ends, ChoiceEnd(pieces=tuple(engines)), output_tokens)
    engine_ends = list(accumulate(map(len, engines)))
    assert known <= min(len(engines), len(ours))
    assert known == 0 or ends[known - 1] == engine_ends[known - 1]
    visible = [number for number in range(known) if engines[number]]
    assert all(ends[number] == engine_ends[number] for number in visible)


@given(st.integers(0, 20), st.integers(0, 20), st.sampled_from(["stop", "length", None]))
def test_without_a_stream_counts_must_be_equal_but_for_the_token_that_ends_it(
    count: int, output_tokens: int, reason: str | None
) -> None:
    known = known_tokens(list(range(count)), None, ChoiceEnd(pieces=("text",), finish_reason=reason), output_tokens)
    equal = count == output_tokens or (reason == "stop" and count == output_tokens - 1)
    assert known == (count if equal else 0)


@given(st.integers(0, 10_000), st.lists(st.integers(0, 1_000), min_size=1, max_size=20))
def test_shares_add_up(total: int, weights: list[int]) -> None:
    parts = shared(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 0
    whole = sum(weights)
    assert all(abs(part - total * weight / whole) < 1 for part, weight in zip(parts, weights, strict=True) if whole)


@given(st.floats(1.0, 8.0), st.lists(st.integers(200, 20_000), min_size=60, max_size=80))
def test_estimates_learn_how_long_tokens_are(characters_a_token: float, prompts: list[int]) -> None:
    estimate = Estimate()
    for characters in prompts:
        estimate.told(characters, round(characters / characters_a_token))
    for _ in range(3):
        estimate.told(100_000, round(100_000 / characters_a_token))
    assert abs(estimate.tokens(40_000) - 40_000 / characters_a_token) <= 0.02 * 40_000 / characters_a_token
    assert estimate.tokens(0) == 1


def test_doubt_follows_the_last_count() -> None:
    agreement = Agreement()
    assert agreement.doubted("documents", uncertain=True)
    assert not agreement.doubted("plain", uncertain=False)
    agreement.told("documents", agrees=True)
    agreement.told("plain", agrees=False)
    assert not agreement.doubted("documents", uncertain=True)
    assert agreement.doubted("plain", uncertain=False)
