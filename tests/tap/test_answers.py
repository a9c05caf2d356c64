"""What is read from an answer does not depend on how it came in pieces, and nothing in it can do harm."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kavier_twin.tap import answers
from kavier_twin.tap.answers import Answer
from kavier_twin.tap.exchanges import End

USAGE = {"prompt_tokens": 7, "completion_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}
EVENTS: list[Any] = [
    {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
    {"choices": [{"delta": {"content": "é"}}, {"delta": {"reasoning_content": "x"}}]},
    {"choices": [{"text": "x", "finish_reason": None}]},
    {"choices": [{"delta": {"tool_calls": [{"index": 0}]}, "finish_reason": "tool_calls"}], "usage": None},
]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["choices", "usage", "delta", "content"]), inner),
    max_leaves=12,
)


def stream(*events: Any, ending: str = "\n") -> bytes:
    lines = [f": ping{ending}", *(f"data: {json.dumps(event)}{ending}{ending}" for event in events)]
    return "".join([*lines, f"data: [DONE]{ending}{ending}"]).encode()


def read(data: bytes, cuts: list[int], *, streamed: bool = True) -> End:
    answer = Answer(streamed=streamed, encoded=False)
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    for start, end in pairwise(places):
        answer.take(data[start:end], float(end))
    return answer.end("a", None, 0.0, 1.0, 2.0)


@given(st.lists(st.integers(0, 10_000)), st.sampled_from(["\n", "\r\n"]))
def test_a_stream_is_read_alike_however_it_is_cut(cuts: list[int], ending: str) -> None:
    counted = read(stream(*EVENTS, ending=ending), cuts)
    assert (counted.output_tokens, counted.prompt_tokens) == (4, None)
    assert [choice.finish_reason for choice in counted.choices] == ["tool_calls", None]
    told = read(stream(*EVENTS, {"choices": [], "usage": USAGE}, ending=ending), cuts)
    assert (told.output_tokens, told.prompt_tokens, told.cached_tokens) == (9, 7, 4)


@given(st.lists(anything, max_size=4), st.binary(max_size=40), st.booleans())
def test_nothing_in_an_answer_does_harm(events: list[Any], noise: bytes, streamed: bool) -> None:
    end = read(stream(*events) + noise + b"\ndata: " + noise, [3, 50], streamed=streamed)
    assert end.output_tokens is None or end.output_tokens >= 0


def test_an_answer_without_end_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "MOST_BYTES", 100)
    for streamed in (True, False):
        answer = Answer(streamed=streamed, encoded=False)
        for _ in range(50):
            answer.take(b"x" * 10, 1.0)
            assert len(answer._rest) <= 100
        assert answer.end("a", "error", 0.0, 1.0, 2.0).output_tokens is None
