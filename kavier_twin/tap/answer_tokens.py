"""The tokens of an answer, as far as its text tells them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from kavier_twin.tap.exchanges import ChoiceEnd


def known_tokens(ids: Sequence[int], ends: Sequence[int] | None, choice: ChoiceEnd, output_tokens: int) -> int:
    """How many of the first ids the engine must have made, where `ids` are the tokens of the choice's whole text.

    A model need not write a text in the tokens that a tokenizer makes of it, and then the engine's cache holds others.
    A stream shows where the engine's tokens end: one piece is one token. `ends` are the characters at which those of
    `ids` end. Where the pieces are no tokens, or there is no stream, equal counts must do; the token that ends an
    answer has no text.
    """
    agreed = 0
    if ends is not None and len(choice.pieces or ()) > 1:
        at = 0
        for number, (piece, end) in enumerate(zip(choice.pieces or (), ends, strict=False)):
            at += len(piece)
            if piece:
                if end != at:
                    break
                agreed = number + 1
    if agreed:
        return agreed
    silent = 1 if choice.finish_reason == "stop" else 0
    return len(ids) if output_tokens - silent <= len(ids) <= output_tokens else 0


def shared(total: int, weights: Sequence[int]) -> list[int]:
    """The total in whole parts proportional to the weights; in equal ones if all are 0."""
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    bounds = [0]
    run = 0
    for weight in weights:
        run += weight
        bounds.append(total * run // whole)
    return [after - before for before, after in pairwise(bounds)]
