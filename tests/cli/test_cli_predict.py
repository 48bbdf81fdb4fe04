"""`millhand predict`: every way in, every way out, what it says, and what it refuses."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

from millhand.cli import EXIT_CODES


def outputs(done):
    assert done.code == 0, done.err
    return {item["name"]: np.array(item["data"]).reshape(item["shape"]) for item in done.data["outputs"]}


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


# ---- ways in --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("json", json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()),
        ("csv", b"1,2\n"),
        ("csv", b"\xef\xbb\xbfleft,right\r\n1, 2\r\n\r\n"),
        ("csv", b"x[1],x[0]\n2,1\n"),
        ("npy", npy(np.array([1, 2]))),
        ("npy", npy(np.array([[1.0, 2.0]], dtype=np.float16))),
        ("npz", npz(whatever=np.array([[1, 2]], dtype=np.uint8))),
    ],
)
def test_one_row_from_stdin_and_from_a_file(node, tmp_path, kind, data):
    words = ("predict", "scale", "--json")
    assert outputs(node.millhand(*words, "--format", kind, stdin=data))["y"].tolist() == [[3.0, 6.0]]
    path = tmp_path / f"one.{kind}"
    path.write_bytes(data)
    assert outputs(node.millhand(*words, "-i", path, "--version", "2"))["y"].tolist() == [[3.0, 6.0]]


def test_several_inputs(node):
    table = b"counts[0],speed,counts[1],counts[2]\n1,1480.5,2,3\n4,1500,5.0,-6\n"
    found = outputs(node.millhand("predict", "pair", "--json", "-f", "csv", stdin=table))
    assert found["speed_out"].tolist() == [[1480.5], [1500.0]]
    assert found["counts_out"].tolist() == [[1, 2, 3], [4, 5, -6]]
    arrays = npz(speed=np.array([[7.5]]), counts=np.array([[1.0, 2.0, 3.0]]))
    assert outputs(node.millhand("predict", "pair", "--json", "-f", "npz", stdin=arrays))["counts_out"].tolist() == [
        [1, 2, 3]
    ]


def test_text_and_truth_values(node):
    assert outputs(node.millhand("predict", "words", "--json", "-f", "csv", stdin="a,ü\n".encode()))["y"].tolist() == [
        ["a", "ü"]
    ]
    named = node.millhand("predict", "words", "--json", "-f", "csv", stdin=b"x[0],x[1]\na,b\n")
    assert outputs(named)["y"].tolist() == [["a", "b"]]
    assert outputs(node.millhand("predict", "words", "--json", "-f", "npy", stdin=npy(np.array(["a", "ü"]))))[
        "y"
    ].tolist() == [["a", "ü"]]
    for data in (b"true,0\n", b"TRUE,false\n"):
        assert outputs(node.millhand("predict", "flags", "--json", "-f", "csv", stdin=data))["y"].tolist() == [
            [True, False]
        ]
    assert outputs(node.millhand("predict", "flags", "--json", "-f", "npy", stdin=npy(np.array([1, 0]))))[
        "y"
    ].tolist() == [[True, False]]


def test_more_rows_than_the_model_takes_at_once(node, tmp_path):
    array = np.arange(300, dtype=np.float32).reshape(150, 2)
    done = node.millhand("predict", "scale", "--json", "-f", "npy", stdin=npy(array))
    np.testing.assert_array_equal(outputs(done)["y"], array * 3)
    assert done.data["outputs"][0]["shape"] == [150, 2]


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_a_classification_is_said_in_words(node):
    done = node.millhand("predict", "fault", "-f", "csv", stdin=b"0,4,0\n")
    assert "It says: bearing outer, 96 % certain." in done.out
    assert "FP32      [1, 3]  0, 4, 0" in done.out
    done = node.millhand("predict", "fault", "--json", "-f", "csv", stdin=b"9,0,0\n0,4,0\n")
    (first, second) = done.data["predictions"]
    assert (first["label"], second["label"]) == ("healthy", "bearing_outer")
    assert second["certainty"] == pytest.approx(0.9647, abs=1e-3)
    assert second["values"]["fault"] == pytest.approx(1 - second["values"]["healthy"])
    many = node.millhand("predict", "fault", "-f", "csv", stdin=b"9,0,0\n" * 12)
    assert "  1  healthy, >99 % certain" in many.out and "… and 2 more rows" in many.out


def test_a_regression_is_said_with_its_unit(node):
    assert "It says: rul 83.25 cycle." in node.millhand("predict", "life", "-f", "csv", stdin=b"83.25\n").out
    done = node.millhand("predict", "life", "--json", "-f", "csv", stdin=b"900\n")
    assert done.data["predictions"] == [{"values": {"rul": 125.0}, "unit": "cycle"}], "clipped as model.toml says"
    assert "says" not in node.millhand("predict", "scale", "-f", "csv", stdin=b"1,2\n").out


def test_what_is_no_number_passes_as_binary(node, tmp_path):
    """For models that take gaps; CSV and JSON hold numbers only."""
    gaps = np.array([[1, np.nan], [-np.inf, 2]], np.float32)
    done = node.millhand("predict", "scale", "-f", "npy", "-o", tmp_path / "o.npy", "--json", stdin=npy(gaps))
    assert done.data["outputs"][0]["data"] == [None, None, None, None], "the model mixes its columns"
    done = node.millhand("predict", "fault", "-f", "npz", "-o", tmp_path / "o.npz", stdin=npz(x=[[0, np.nan, 9]]))
    assert done.code == 0 and "holds numbers that are not finite" in done.out
    np.testing.assert_array_equal(np.load(tmp_path / "o.npz")["y"], [[0, np.nan, 9]])
    for cell, hint in (("nan", "; fill gaps, or send them as NaN in .npy or .npz"), ("1e39", ""), ("inf", "")):
        done = node.millhand("predict", "scale", "-f", "csv", stdin=f"1,{cell}\n".encode())
        assert done.error.endswith(f"Try: input 'x' takes FP32{hint}\n")
    done = node.millhand("predict", "pair", "-f", "csv", stdin=b"speed,counts[0],counts[1],counts[2]\n1,2.5,3,4\n")
    assert done.error.endswith("Try: input 'counts' takes INT16\n")


# ---- ways out -------------------------------------------------------------------------------------------------------


def test_output_files(node, tmp_path):
    words = ("predict", "fault", "-f", "csv", "-o")
    table = b"0,4,0\n9,0,0\n"
    assert "Written to" in node.millhand(*words, tmp_path / "o.npy", stdin=table).out
    np.testing.assert_array_equal(np.load(tmp_path / "o.npy"), [[0, 4, 0], [9, 0, 0]])
    node.millhand(*words, tmp_path / "o.npz", stdin=table)
    np.testing.assert_array_equal(np.load(tmp_path / "o.npz")["y"], [[0, 4, 0], [9, 0, 0]])
    node.millhand(*words, tmp_path / "o.json", stdin=table)
    assert json.loads((tmp_path / "o.json").read_text())["predictions"][0]["label"] == "bearing_outer"
    node.millhand(*words, tmp_path / "o.csv", stdin=table)
    rows = list(csv.DictReader((tmp_path / "o.csv").read_text().splitlines()))
    assert [row["prediction"] for row in rows] == ["bearing_outer", "healthy"]
    assert rows[0]["y[1]"] == "4.0" and 0.96 < float(rows[0]["certainty"]) < 0.97
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.csv", "o.json", "o.npy", "o.npz"]


def test_an_output_comes_back_as_an_input(node, tmp_path):
    """Columns of a CSV are named as `predict` reads them."""
    node.millhand("predict", "scale", "-f", "csv", "-o", tmp_path / "o.csv", stdin=b"1,2\n3,4\n")
    assert (tmp_path / "o.csv").read_text() == "y[0],y[1]\n3.0,6.0\n9.0,12.0\n"
    assert outputs(node.millhand("predict", "scale", "--json", "-i", tmp_path / "o.csv"))["y"].tolist() == [
        [9.0, 18.0],
        [27.0, 36.0],
    ]


# ---- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind", "data", "message"),
    [
        ("scale", "csv", b"1,2\n3,x\n", "'stdin' line 2, column 2: 'x' is no number"),
        ("scale", "csv", b"a,b\n\n1,2\n3,x\n", "line 4, column 2 (b): 'x' is no number"),
        ("scale", "csv", b"1,x\n3,4\n", "line 1, column 2: 'x' is no number"),
        ("scale", "csv", b"1,nan\n", "column 2: 'nan' is no finite number"),
        ("scale", "csv", b"1,\n", "column 2: '' is no number"),
        ("scale", "csv", b"1,1e39\n", "'1e39' is too large for FP32"),
        ("scale", "csv", b"1,2\n3\n", "line 2 has 1 cells, the first line has 2"),
        ("scale", "csv", b"1,2,3\n", "has 3 columns, input 'x' of shape [-1, 2] takes 2 a row"),
        ("scale", "csv", b"a,b\n", "holds no row of values"),
        ("scale", "csv", b"", "holds no row of values"),
        ("scale", "csv", b"x[0],x[2]\n1,2\n", "a row of it takes 2; 'x[1]' is missing"),
        ("scale", "csv", b"x[0],x[0]\n1,2\n", "has two columns 'x[0]'"),
        ("scale", "csv", b'1,"2\n', "is not valid CSV"),
        ("scale", "csv", b"\xff\xfe1,2", "is not UTF-8 text"),
        ("pair", "csv", b"1,2,3,4\n", "column 1: '1' is no input of the model"),
        ("pair", "csv", b"sped,counts[0],counts[1],counts[2]\n1,2,3,4\n", "did you mean 'speed'?"),
        ("pair", "csv", b"speed,counts[0],counts[1]\n1,2,3\n", "'counts[2]' is missing"),
        ("pair", "csv", b"speed,counts[0],counts[1],counts[2]\n1,2.5,3,4\n", "(counts[0]): '2.5' is no whole number"),
        ("pair", "csv", b"speed,counts[0],counts[1],counts[2]\n1,2,3,40000\n", "'40000' does not fit INT16"),
        ("pair", "npy", npy(np.zeros((1, 4))), "holds one array, the model has the inputs speed, counts"),
        ("pair", "npz", npz(speed=np.zeros((1, 1))), "has no array 'counts'"),
        ("pair", "npz", npz(spee=np.zeros((1, 1)), counts=np.zeros((1, 3))), "did you mean 'speed'?"),
        ("pair", "npz", npz(speed=np.zeros((2, 1)), counts=np.zeros((1, 3))), "'speed' 2, 'counts' 1"),
        ("pair", "npz", npz(speed=np.zeros((1, 1)), counts=np.full((1, 3), 40000)), "40000 does not fit INT16"),
        ("pair", "npz", npz(speed=np.zeros((1, 1)), counts=np.full((1, 3), 0.5)), "0.5 at [0, 0] is no whole number"),
        ("scale", "npy", npy(np.zeros((1, 3))), "shape [1, 3], expected [-1, 2]"),
        ("scale", "npy", npy(np.zeros((0, 2))), "give all inputs as many rows, at least one"),
        ("pair", "npz", npz(speed=np.zeros((1, 1)), counts=np.full((1, 3), np.nan)), "nan at [0, 0] is no finite num"),
        ("scale", "npy", npy(np.array([[1, 1e39]])), "1e+39 at [0, 1] is too large for FP32"),
        ("scale", "npy", npy(np.array(["a", "b"])), "dtype <U1 is no number"),
        ("scale", "npy", npy(np.array([1, 2j])), "dtype complex128 is no number"),
        ("scale", "npy", b"no array", "cannot be read as .npy"),
        ("scale", "npz", b"PK\x03\x04", "cannot be read as .npz"),
        ("words", "npy", npy(np.array([1, 2])), "dtype int64 is no text"),
        ("flags", "csv", b"true,2\n", "'2' is neither true nor false"),
        ("flags", "npy", npy(np.array([1, 2])), "2 at [0, 1] is neither 0 nor 1"),
        ("scale", "json", b"{", "is not valid JSON"),
        ("scale", "json", b'{"inputs": [NaN]}', "NaN is no JSON number"),
        ("scale", "json", b"[]", "has no key 'inputs'"),
        ("scale", "json", b'{"inputs": [{"name": "x"}]}', "no inference request"),
    ],
)
def test_bad_input_is_named(node, model, kind, data, message):
    done = node.millhand("predict", model, "--format", kind, stdin=data)
    assert done.code == EXIT_CODES["error"]
    assert message in done.error
    assert "\nTry: " in done.error
    assert done.out == ""


def test_bad_words(node, tmp_path):
    done = node.millhand("predict", "scale", "-i", tmp_path / "rows.txt")
    assert "does not tell its format" in done.error and "--format json|csv|npy|npz" in done.error
    done = node.millhand("predict", "scale", "-f", "csv", "-o", tmp_path / "out.txt", stdin=b"1,2\n")
    assert "the name of the output" in done.error and "end it in one of .json, .csv, .npy, .npz" in done.error
    assert "cannot be read: No such file" in node.millhand("predict", "scale", "-i", tmp_path / "no.csv").error
    done = node.millhand("predict", "scal", "-f", "csv", stdin=b"1,2\n")
    assert "did you mean 'scale'" in done.error
    done = node.millhand(
        "predict",
        "pair",
        "-f",
        "csv",
        "-o",
        tmp_path / "o.npy",
        stdin=b"speed,counts[0],counts[1],counts[2]\n1,2,3,4\n",
    )
    assert "can hold one output; the model gives speed_out, counts_out" in done.error
    assert not list(tmp_path.iterdir())
    done = node.millhand("predict", "scale", "-f", "csv", "-o", "/nowhere/o.csv", stdin=b"1,2\n")
    assert "'/nowhere/o.csv' cannot be written" in done.error
    assert node.millhand("predict", "scale", "-f", "csv", "--version", "0", stdin=b"1,2\n").code == EXIT_CODES["usage"]
    assert "no version 7" in node.millhand("predict", "scale", "-f", "csv", "--version", "7", stdin=b"1,2\n").error
