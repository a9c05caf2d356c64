from __future__ import annotations

import json
from pathlib import Path

import pytest

from connectors.series import CARBON_COLUMN, HIGHEST_CARBON, SeriesError, read_series


def read(tmp_path: Path, text: str, name: str = "carbon.csv") -> tuple[tuple[float, float], ...]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return read_series(path, CARBON_COLUMN, HIGHEST_CARBON)


def test_csv_with_times_of_every_kind(tmp_path: Path) -> None:
    text = "zone,time,gco2_per_kwh\nDE,1970-01-01T00:00:00Z,100\nDE,1970-01-01T02:00:00+01:00,200.5\nDE,7200,0\n"
    assert read(tmp_path, text) == ((0.0, 100.0), (3600.0, 200.5), (7200.0, 0.0))
    assert read(tmp_path, "\ufeff" + text.replace("\n", "\r\n")) == read(tmp_path, text)  # as spreadsheets save it


def test_json(tmp_path: Path) -> None:
    entries = [{"time": "1970-01-01T01:00:00Z", "gco2_per_kwh": 100}, {"time": 7200, "gco2_per_kwh": 50, "zone": "DE"}]
    assert read(tmp_path, json.dumps(entries)) == ((3600.0, 100.0), (7200.0, 50.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a header with the columns time and gco2_per_kwh"),
        ("time,value\n0,1\n", "found time,value"),
        ("time,gco2_per_kwh\n", "no value in it"),
        ("time,gco2_per_kwh\n2026-01-31T23:00:00,100\n", "line 2: time '2026-01-31T23:00:00' names no time zone"),
        ("time,gco2_per_kwh\nyesterday,100\n", "line 2: time 'yesterday': expected ISO 8601"),
        ("time,gco2_per_kwh\n0,1\n1,-1\n", "line 3: gco2_per_kwh '-1': expected a number from 0"),
        ("time,gco2_per_kwh\n0,\n", "line 2: gco2_per_kwh ''"),
        ("time,gco2_per_kwh\n0\n", "line 2: gco2_per_kwh None"),
        ("time,gco2_per_kwh\n0,nan\n", "line 2: gco2_per_kwh 'nan'"),
        ("time,gco2_per_kwh\n5,1\n5,2\n", "line 3: time 5 is not after the one before"),
        ("time,gco2_per_kwh\n" + "0,-1\n" * 9, "and 4 more"),
        ("[1]", "expected a JSON list of"),
        ("[{]", "not JSON"),
        ('[{"time": 0}]', "entry 0: gco2_per_kwh None"),
        ('[{"time": true, "gco2_per_kwh": 1}]', "entry 0: time True"),
        ('[{"time": NaN, "gco2_per_kwh": 1}]', "entry 0: time nan"),
    ],
)
def test_what_is_no_series_is_told_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SeriesError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
    assert str(tmp_path / "carbon.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SeriesError, match="No such file"):
        read_series(tmp_path / "gone.csv", CARBON_COLUMN, HIGHEST_CARBON)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(SeriesError, match="UTF-8"):
        read_series(tmp_path / "binary", CARBON_COLUMN, HIGHEST_CARBON)
