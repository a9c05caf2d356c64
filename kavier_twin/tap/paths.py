"""Which paths generate text, behind whatever prefix an ingress or `--root-path` puts before them."""

from __future__ import annotations

from typing import Final, Literal

Kind = Literal["chat", "completion", "responses", "messages", "generate", "invocation"]

# The last segments of a path, longest first. A prefix, a trailing slash and double slashes change nothing.
_RECORDED: Final[tuple[tuple[tuple[str, ...], Kind], ...]] = (
    (("chat", "completions", "batch"), "chat"),
    (("inference", "v1", "generate"), "generate"),
    (("chat", "completions"), "chat"),
    (("v1", "responses"), "responses"),
    (("v1", "messages"), "messages"),
    (("completions",), "completion"),
    (("invocations",), "invocation"),
)
_NOT_RECORDED: Final = (
    ("v2", "chat"),
    ("audio", "transcriptions"),
    ("audio", "translations"),
    ("v1", "realtime"),
    ("v1", "systemone"),
    ("generative_scoring",),
    ("generate",),
    ("generate_stream",),
)


def kind_of(path: str) -> Kind | None:
    """The kind of request that the path takes if the tap makes records of it, else None."""
    found = _found(path)
    return found[0] if found else None


def prefix_of(path: str) -> str:
    """What stands before the engine's own path: empty, or a prefix without a slash at its end."""
    found = _found(path)
    if found is None:
        return ""
    segments = _segments(path)[: -found[1]]
    if segments and segments[-1] == "v1":
        segments.pop()
    return "".join(f"/{segment}" for segment in segments)


def generates(path: str) -> bool:
    """Whether the path generates text although the tap makes no record of it."""
    segments = tuple(_segments(path))
    return kind_of(path) is None and any(segments[-len(end) :] == end for end in _NOT_RECORDED)


def _found(path: str) -> tuple[Kind, int] | None:
    segments = tuple(_segments(path))
    for end, kind in _RECORDED:
        if segments[-len(end) :] == end:
            return kind, len(end)
    return None


def _segments(path: str) -> list[str]:
    return [segment for segment in path.split("/") if segment]
