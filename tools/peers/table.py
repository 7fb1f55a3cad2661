"""The comparison as Markdown: a row for each model, and in words where a peer is ahead of lrcompile."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tools.peers.catalogue import PEERS
from tools.peers.search import TOLERANCE

OURS = "lrcompile"
OWN = "lrcompile, its own recovery"
INT8 = "lrcompile, int8"
LOWER_IS_BETTER = ("perplexity",)
WHENS = ("rewritten", "recovered")


def at_the_speed_of(name: str) -> str:
    """What the row of lrcompile in int8 is called that is asked for the speed of a peer alone."""
    return f"{INT8} at the speed of {name}"


def is_integers(name: str) -> bool:
    """Whether the row of that name is of a model in int8."""
    return name.startswith(INT8) or (name in PEERS and not PEERS[name].searched)


@dataclass(frozen=True)
class Row:
    """A model: `ratio` is its time over the original's with an interval of 95 %, None where there is no model.

    `size` is its share of the bytes of weights; `share` what the peer was asked for; `before` and `after` are what it
    is judged at without and with recovery, empty where it was not.
    """

    name: str
    ratio: tuple[float, float, float] | None = None
    size: float = 0.0
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    share: float | None = None
    notes: tuple[str, ...] = ()


def table(original: Mapping[str, float], settings: str, rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown; the first row is that of lrcompile. What is better than its counterpart is bold."""
    names = list(original)
    yield f"Original: {', '.join(f'{name} {value:.4g}' for name, value in original.items())}; {settings}."
    yield ""
    columns = [f"{name}, {when}" for name in names for when in WHENS]
    yield f"| model | speed-up | weights | {' | '.join(columns)} | steps | |"
    yield "|" + "---|" * (5 + len(columns))
    for row in rows:
        yield f"| {row.name} | {' | '.join(_cells(row, counterpart(row, rows), names))} | {'; '.join(_notes(row))} |"
    yield ""
    yield from verdict(rows)


def _notes(row: Row) -> Iterator[str]:
    if row.share is not None:
        yield f"share {row.share:.2f}"
    yield from row.notes


def _cells(row: Row, ours: Row, names: Sequence[str]) -> Iterator[str]:
    if row.ratio is None:
        yield from [""] * (3 + 2 * len(names))
        return
    ratio, low, high = row.ratio
    yield f"{1 / ratio:.2f}× ({1 / high:.2f}–{1 / low:.2f})"
    yield f"{row.size:.0%}"
    for name in names:
        for got, least in ((row.before, ours.before), (row.after, ours.after)):
            text = f"{got[name]:.4g}" if got else ""
            yield f"**{text}**" if row is not ours and text and is_better(name, got, least) else text
    yield str(row.steps) if row.after else ""


def is_better(name: str, got: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether a model is judged better at something than another that was judged at it too."""
    if name not in other:
        return False
    return got[name] < other[name] if name in LOWER_IS_BETTER else got[name] > other[name]


def counterpart(row: Row, rows: Sequence[Row]) -> Row:
    """What of lrcompile a row is compared with: what is in int8 with that in int8, if there is one, of its speed."""
    if row.name.startswith(INT8):
        return row
    names = (at_the_speed_of(row.name), INT8) if is_integers(row.name) else ()
    measured = {other.name: other for other in rows if other.ratio}
    return next((measured[name] for name in names if name in measured), rows[0])


def slower_and_better(rows: Sequence[Row]) -> list[Row]:
    """Peers in int8 that are better at something than their counterpart, and slower, but faster than the original."""
    found = []
    for row in rows:
        ours = counterpart(row, rows)
        if not is_integers(row.name) or row is ours or row.ratio is None or ours.ratio is None:
            continue
        slower = ours.ratio[0] * (1 + TOLERANCE) < row.ratio[0] < 1
        if slower and any(is_better(name, row.before, ours.before) for name in row.before):
            found.append(row)
    return found


def verdict(rows: Sequence[Row]) -> Iterator[str]:
    """Sentences: each peer that is as fast as lrcompile and better at something, and what it does differently."""
    peers = [row for row in rows if row.name in PEERS and row.ratio]
    behind, ahead = [], False
    for row in peers:
        ours = counterpart(row, rows)
        assert ours.ratio is not None
        assert row.ratio is not None
        if row.ratio[0] > ours.ratio[0] * (1 + TOLERANCE):
            behind.append(row.name)
            continue
        leads = [
            f"{name} {got[name] - least[name]:+.3g} {when}"
            for when, got, least in zip(WHENS, (row.before, row.after), (ours.before, ours.after), strict=True)
            for name in got
            if is_better(name, got, least)
        ]
        if leads:
            ahead = True
            quicker = ours.ratio[0] / row.ratio[0]
            speed = f", at {quicker:.2f}× its speed" if quicker > 1 + TOLERANCE else " at the same speed"
            yield f"- **{row.name} is ahead of {ours.name}{speed}**: {', '.join(leads)}. It {PEERS[row.name].edge}."
    if not ahead:
        yield "- No peer is ahead of lrcompile at its speed or above."
    if behind:
        yield f"- Not as fast as lrcompile, so that its figures are of a slower model: {', '.join(behind)}."
