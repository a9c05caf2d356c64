from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from kavier_twin.simulation.carbon import CarbonIntensity

HOUR, DAY = 3600.0, 86_400.0
BY_HOUR = tuple(float(10 * hour) for hour in range(24))
DAILY = CarbonIntensity(by_hour_utc=BY_HOUR)

moments = st.floats(0.0, 2e9)
lengths = st.floats(0.0, 3 * DAY)


def test_a_number_is_the_same_always() -> None:
    carbon = CarbonIntensity.model_validate(250)
    assert carbon == CarbonIntensity(gco2_per_kwh=250.0)
    assert carbon.mean_gco2_per_kwh(5.0, 6.0) == 250.0


def test_the_day_begins_at_midnight_utc_and_wraps() -> None:
    midnight = 20_000 * DAY
    assert DAILY.mean_gco2_per_kwh(midnight, midnight) == 0.0
    assert DAILY.mean_gco2_per_kwh(midnight + 13 * HOUR, midnight + 14 * HOUR) == 130.0
    assert DAILY.mean_gco2_per_kwh(midnight - HOUR, midnight) == 230.0
    # A quarter of an hour of the day's last hour, three quarters of the next day's first.
    assert DAILY.mean_gco2_per_kwh(midnight - 0.25 * HOUR, midnight + 0.75 * HOUR) == pytest.approx(0.25 * 230.0)


@given(moments, lengths)
def test_the_schedule_repeats_every_day(start: float, length: float) -> None:
    start = math.floor(start)
    mean = DAILY.mean_gco2_per_kwh(start, start + length)
    assert mean == pytest.approx(DAILY.mean_gco2_per_kwh(start + DAY, start + DAY + length), rel=1e-6, abs=1e-6)
    assert 0.0 <= mean <= 230.0 + 1e-6


@given(moments)
def test_a_whole_day_is_the_mean_of_its_hours(start: float) -> None:
    assert DAILY.mean_gco2_per_kwh(start, start + DAY) == pytest.approx(sum(BY_HOUR) / 24)


@given(st.sampled_from([DAILY, CarbonIntensity(points=tuple((HOUR * n, v) for n, v in enumerate(BY_HOUR)))]), st.data())
def test_parts_weigh_by_their_length(carbon: CarbonIntensity, data: st.DataObject) -> None:
    start, middle, end = sorted(data.draw(st.lists(st.floats(0.0, 23 * HOUR), min_size=3, max_size=3)))
    parts = carbon.mean_gco2_per_kwh(start, middle) * (middle - start)
    parts += carbon.mean_gco2_per_kwh(middle, end) * (end - middle)
    assert carbon.mean_gco2_per_kwh(start, end) * (end - start) == pytest.approx(parts, rel=1e-9, abs=1e-6)


def test_a_series_holds_each_value_until_the_next() -> None:
    series = CarbonIntensity(points=((0.0, 100.0), (HOUR, 300.0)))
    assert series.mean_gco2_per_kwh(0.0, HOUR) == 100.0
    assert series.mean_gco2_per_kwh(0.0, 2 * HOUR) == 200.0
    assert series.mean_gco2_per_kwh(HOUR, HOUR) == 300.0


def test_what_a_series_does_not_cover_is_not_known() -> None:
    series = CarbonIntensity(points=((0.0, 100.0), (HOUR, 200.0), (5 * HOUR, 300.0)), longest_gap_seconds=2 * HOUR)
    assert math.isnan(series.mean_gco2_per_kwh(-1.0, 0.0))
    assert math.isnan(series.mean_gco2_per_kwh(-1.0, HOUR))
    assert series.mean_gco2_per_kwh(0.5 * HOUR, 3 * HOUR) == pytest.approx(180.0)  # held for two hours
    assert math.isnan(series.mean_gco2_per_kwh(0.5 * HOUR, 3 * HOUR + 1))
    assert math.isnan(series.mean_gco2_per_kwh(4 * HOUR, 5 * HOUR))
    assert math.isnan(series.mean_gco2_per_kwh(0.0, 6 * HOUR))
    assert series.mean_gco2_per_kwh(6 * HOUR, 7 * HOUR) == 300.0  # held beyond the end
    assert math.isnan(series.mean_gco2_per_kwh(7 * HOUR, 7 * HOUR + 1))


def test_a_series_grows_in_any_order() -> None:
    series = CarbonIntensity(gco2_per_kwh=1.0)
    for time, value in ((2.0, 20.0), (1.0, 10.0), (2.0, 25.0), (3.0, 30.0)):
        series = series.with_point(time, value)
    assert series.points == ((1.0, 10.0), (2.0, 25.0), (3.0, 30.0))
    assert series.gco2_per_kwh is None


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({}, "give one of"),
        ({"gco2_per_kwh": 1.0, "points": [[0, 1]]}, "give one of"),
        ({"by_hour_utc": [1.0] * 23}, "at least 24"),
        ({"gco2_per_kwh": -1.0}, "greater than or equal to 0"),
        ({"points": [[1, 5], [1, 6]]}, "times must increase"),
        ({"points": [[1, math.nan]]}, "points"),
        ({"gco2": 1.0}, "Extra inputs"),
        (True, "valid dictionary"),
        (math.nan, "gco2_per_kwh"),
    ],
)
def test_what_is_no_intensity_is_refused(wrong: object, said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        CarbonIntensity.model_validate(wrong)


def test_a_file_must_be_read_first() -> None:
    with pytest.raises(ValueError, match=r"de\.csv was not read"):
        CarbonIntensity.model_validate({"file": "de.csv"}).mean_gco2_per_kwh(0.0, 1.0)
