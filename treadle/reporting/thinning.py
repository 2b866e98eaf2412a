"""Long curves with fewer points: the lowest and the highest of each stretch stay, so that no spike is lost."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")
DIGITS = 6  # of a value in a report; fp32 holds seven


def thinned(steps: list[int], columns: dict[str, list[Any]], most: int) -> tuple[list[int], dict[str, dict[str, list[Any]]]]:
    """Steps and columns (values parallel to them, None where there is none) -> (the steps that are still needed, for each column
    {"at": places in them, "values"}), at most about `most` points a column. `tokens` and `seconds`, which other columns are drawn
    against, keep every step that any column keeps."""
    axes = [name for name in ("tokens", "seconds") if name in columns]
    kept = {name: _extremes(values, most) for name, values in columns.items() if name not in axes}
    places = sorted({place for some in kept.values() for place in some} | ({0, len(steps) - 1} if steps else set()))
    kept |= {name: [place for place in places if columns[name][place] is not None] for name in axes}
    where = {place: number for number, place in enumerate(places)}
    made = {name: {"at": [where[place] for place in some], "values": [rounded(columns[name][place]) for place in some]}
            for name, some in kept.items()}  # fmt: skip
    return [steps[place] for place in places], made


def _extremes(values: list[Any], most: int) -> list[int]:
    """Places of the values that stay: of each of most / 2 stretches the lowest and the highest, and the first and last of all."""
    places = [place for place, value in enumerate(values) if value is not None]
    if len(places) <= most:
        return places
    stretches = max(1, most // 2)
    chosen = {places[0], places[-1]}
    for number in range(stretches):
        stretch = places[len(places) * number // stretches : len(places) * (number + 1) // stretches]
        chosen |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    return sorted(chosen)


def spread(rows: list[T], most: int) -> list[T]:
    """At most so many rows, at even distances, with the first and the last."""
    if len(rows) <= most:
        return rows
    return [rows[round(number * (len(rows) - 1) / (most - 1))] for number in range(most)]


def rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
