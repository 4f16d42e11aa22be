"""The site's mapping and its tables: CSV, Parquet and SQL, units and codes, and what is refused."""

from __future__ import annotations

import gzip
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from consortium.client.columns import Column
from consortium.client.mapping import load, parse
from consortium.client.tables import read, read_some
from consortium.client.task import Source
from consortium.protocol.errors import InputError

AGE = Column("age", range=(0.0, 120.0))
SEX = Column("sex", values=("female", "male"))
ILL = Column("ill", values=("0", "1"), closed=True, needed=True)
SECRET = "4711.25"
"""A cell that no message may hold."""


def csv(folder: Path, text: str, name: str = "ward.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def refusal(source: Source, *columns: Column) -> str:
    """The message of the refusal, which must be an InputError."""
    with pytest.raises(InputError) as caught:
        read(source, columns)
    return str(caught.value)


def test_without_a_mapping_columns_are_taken_as_they_are(tmp_path: Path) -> None:
    """No mapping is the identity: numbers as numbers, values as their index, blanks as missing."""
    path = csv(tmp_path, "ill,age,sex,other\n1,40.5,male,x\n0,,female,y\n1,7,,z\n0,8,neither,z\n")
    frame = read(Source("a", path), [AGE, SEX, ILL])
    assert list(frame.columns) == ["age", "sex", "ill"]
    np.testing.assert_array_equal(frame["age"], [40.5, np.nan, 7, 8])
    np.testing.assert_array_equal(frame["sex"], [1, 0, np.nan, -1])
    np.testing.assert_array_equal(frame["ill"], [1, 0, 1, 0])


def test_a_mapping_turns_columns_units_and_codes_into_the_studys(tmp_path: Path) -> None:
    """Names, scale and offset, codes and missing markers of a mapping file are all applied."""
    mapping = csv(
        tmp_path,
        """
        format = 1
        missing = ["?", -9]
        [source]
        separator = ";"
        decimal = ","
        [columns.temperature]
        column = "temp_f"
        scale = 0.5555555555555556
        offset = -17.77777777777778
        [columns.sex]
        column = "geschlecht"
        codes = { M = "male", W = "female", D = "" }
        missing = ["U"]
        [columns.ill]
        column = "Diagnose, ja"
        codes = { ja = 1, nein = 0 }
        """,
        "mapping.toml",
    )
    path = csv(
        tmp_path, "temp_f;geschlecht;Diagnose, ja\n98,6;M;ja\n-9;W;nein\n?;U;ja\n212;D;nein\n", "ward.csv"
    )
    frame = read(Source("a", path, load(mapping)), [Column("temperature"), SEX, ILL])
    np.testing.assert_allclose(frame["temperature"], [37.0, np.nan, np.nan, 100.0])
    np.testing.assert_array_equal(frame["sex"], [1, 0, np.nan, -1])
    np.testing.assert_array_equal(frame["ill"], [1, 0, 1, 0])


def test_a_code_wins_over_a_common_missing_marker(tmp_path: Path) -> None:
    """NA is no value, unless the mapping gives it a code: Namibia."""
    path = csv(tmp_path, "country\nNA\nDE\n")
    column = Column("country", values=("germany", "namibia"))
    codes = {"format": 1, "columns": {"country": {"codes": {"NA": "namibia", "DE": "germany"}}}}
    np.testing.assert_array_equal(read(Source("a", path), [column])["country"], [np.nan, -1])
    np.testing.assert_array_equal(read(Source("a", path, codes), [column])["country"], [1, 0])


def test_csv_parquet_sql_and_memory_give_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One table in five forms, with typed columns, decimals and blanks, is read alike."""
    frame = pd.DataFrame(
        {
            "age": [40.5, None, 7.0, 8.25],
            "sex": ["male", "female", None, "other"],
            "ill": [1, 0, 1, 0],
            "person": ["007", "8", "9", "007"],
        }
    )
    columns = [AGE, SEX, ILL, Column("person", text=True)]
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress((tmp_path / "t.csv").read_bytes()))
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "t.parquet")
    frame.astype({"sex": "category", "ill": "bool"}).to_parquet(tmp_path / "bool.parquet")
    with sqlite3.connect(tmp_path / "t.db") as connection:
        frame.to_sql("patients", connection, index=False)
    connection.close()
    monkeypatch.setenv("WARD_DATABASE", f"sqlite:///{tmp_path / 't.db'}")
    sql = {"format": 1, "source": {"sql": "SELECT *, '12:30' AS t FROM patients", "url": "env:WARD_DATABASE"}}
    true = {"format": 1, "columns": {"ill": {"codes": {"true": 1, "false": 0}}}}
    sources = [
        Source("a", tmp_path / "t.csv.gz"),
        Source("a", tmp_path / "t.tsv"),
        Source("a", tmp_path / "t.parquet"),
        Source("a", tmp_path / "bool.parquet", true),
        Source("a", mapping=sql),
        Source("a", table=frame),
    ]
    expected = read(Source("a", tmp_path / "t.csv"), columns)
    assert expected["person"].tolist() == ["007", "8", "9", "007"]
    for source in sources:
        pd.testing.assert_frame_equal(read(source, columns), expected)


def test_the_databases_url_may_stand_in_a_file(tmp_path: Path) -> None:
    """`url = "file:..."` is read from that file."""
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute("CREATE TABLE t AS SELECT 5.5 AS age")
    connection.close()
    (tmp_path / "url").write_text(f"sqlite:///{tmp_path / 't.db'}\n")
    mapping = {"format": 1, "source": {"sql": "SELECT age FROM t", "url": f"file:{tmp_path / 'url'}"}}
    assert read(Source("a", mapping=mapping), [AGE])["age"].tolist() == [5.5]


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("postgresql://reader:hunter2@db/ward", "holds a password"),
        ("postgresql://reader@db/ward?password=hunter2", "holds a password"),
        ("postgresql://reader@db/ward?sslpassword=hunter2", "holds a password"),
        ("hunter2", "is not a database URL"),
        ("postgresql://reader@db:hunter2/ward", "is not a database URL"),
    ],
)
def test_a_password_in_the_url_is_refused_and_not_repeated(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the mapping or where it points to: the message says what to use instead, and never the password."""
    monkeypatch.setenv("WARD_DATABASE", url)
    for written in (url, "env:WARD_DATABASE"):
        message = refusal(
            Source("a", mapping={"format": 1, "source": {"sql": "SELECT 1", "url": written}}), AGE
        )
        assert words in message
        assert "env:NAME" in message
        assert "file:PATH" in message
        assert "hunter2" not in message
        assert "pgpass" in message or "password" not in words


def test_the_password_itself_in_the_mapping_is_refused_and_not_repeated() -> None:
    """`password` takes a reference only."""
    source = {"sql": "SELECT 1", "url": "postgresql://reader@db/ward", "password": "hunter2"}
    with pytest.raises(InputError, match=r"env:NAME.*never the password itself") as caught:
        parse({"format": 1, "source": source})
    assert "hunter2" not in str(caught.value)


def test_every_mistake_of_a_mapping_is_named_at_once(tmp_path: Path) -> None:
    """Unknown keys with the nearest name, wrong types, and combinations that make no sense."""
    path = csv(
        tmp_path,
        """
        format = 2
        colums = {}
        [source]
        sql = "SELECT 1"
        seperator = ";"
        [columns.age]
        scale = "0.5"
        [columns.sex]
        codes = { M = [1] }
        cods = 1
        """,
        "mapping.toml",
    )
    with pytest.raises(InputError) as caught:
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 6 mistakes")
    for words in (
        "format: format = 1",
        "did you mean 'columns'?",
        "did you mean 'separator'?",
        "columns.age.scale: ",
        "columns.sex.codes.M: ",
        "did you mean 'codes'?",
    ):
        assert words in message
    with pytest.raises(InputError) as caught:
        parse(
            {
                "source": {"sql": "SELECT 1"},
                "columns": {"age": {"scale": 0.0}, "sex": {"codes": {"M": "male"}, "offset": 1.0}},
            }
        )
    message = str(caught.value)
    for words in (
        "4 mistakes",
        "format = 1 is needed",
        "source.url",
        "columns.age.scale",
        "columns.sex.codes: either",
    ):
        assert words in message


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read"), (b"\xff\xfe", "UTF-8"), (b"a = ", "TOML")]
)
def test_an_unreadable_mapping_is_an_input_error(tmp_path: Path, content: bytes | None, words: str) -> None:
    """A mapping that is missing, no text, or no TOML."""
    if content is not None:
        (tmp_path / "mapping.toml").write_bytes(content)
    with pytest.raises(InputError, match=words):
        load(tmp_path / "mapping.toml")


def test_missing_columns_are_all_named_with_the_nearest_name(tmp_path: Path) -> None:
    """Each column that is not there is named with what comes nearest, by table or by mapping."""
    path = csv(tmp_path, "agee,ward\n1,2\n")
    mapping = {"format": 1, "columns": {"ill": {"column": "wards"}, "sexx": {"column": "ward"}}}
    message = refusal(Source("north", path, mapping), AGE, SEX, ILL)
    assert message.startswith(f"site 'north', {path}: 3 mistakes")
    assert "column 'age': there is no such column, did you mean 'agee'?" in message
    assert "column 'sex': there is no such column, did you mean 'sexx'?" in message
    assert "column 'ill' (here 'wards'): there is no such column, did you mean 'ward'?" in message
    assert "docs/data.md" in message


def test_a_missing_header_line_is_noticed_and_its_cells_are_not_repeated(tmp_path: Path) -> None:
    """Where the names are numbers no nearest name is given, as it would be a record's cell."""
    message = refusal(Source("a", csv(tmp_path, f"age9,{SECRET}\n1,2\n")), Column("age"))
    assert "header line" in message
    assert "age9" not in message
    assert SECRET not in message


def test_wrong_cells_are_counted_by_row_and_never_shown(tmp_path: Path) -> None:
    """All columns' mistakes at once: counts and row numbers, but no cell."""
    path = csv(
        tmp_path,
        "age,sex,ill,weight\n"
        f"x{SECRET},male,1,70\n40,M{SECRET},0,inf\nx{SECRET},female,x{SECRET},5\n41,male,,7000\n",
    )
    mapping = {"format": 1, "columns": {"sex": {"codes": {"male": "male", "female": "female"}}}}
    weight = Column("weight", range=(0.0, 300.0), closed=True)
    message = refusal(Source("a", path, mapping), AGE, SEX, ILL, weight)
    assert "4 mistakes" in message
    assert "column 'age': 2 of 4 rows (rows 1, 3) are not a finite number" in message
    assert "column 'sex': 1 of 4 rows (row 2) is coded in a way" in message
    assert "column 'ill': 1 of 4 rows (row 3) is not a value that the study knows" in message
    assert "column 'weight': 1 of 4 rows (row 2) is not a finite number" in message
    assert SECRET not in message
    path = csv(tmp_path, f"ill,weight\n,{SECRET}\n1,5\n")
    message = refusal(Source("a", path), ILL, weight)
    assert "column 'ill': 1 of 2 rows (row 1) is without a value" in message
    assert "column 'weight': 1 of 2 rows (row 1) is outside the study's range [0, 300]" in message
    assert SECRET not in message


def test_a_tolerated_share_of_unreadable_rows_is_skipped_and_counted(tmp_path: Path) -> None:
    """Each bad row once, by its first reason, rows of too many cells too; the others are as before, under the numbers
    that they have in the file."""
    rows = [f"{20 + i},{i % 2}" for i in range(100)]
    good = read(Source("a", csv(tmp_path, "age,ill\n" + "\n".join(rows) + "\n")), [AGE, ILL])
    for number, row in {3: f"x{SECRET},1", 10: "30,7", 11: "31,", 50: "1,2,3", 70: "y,9"}.items():
        rows[number] = row
    path = csv(tmp_path, "age,ill\n" + "\n".join(rows) + "\n")
    found, skipped = read_some(Source("a", path), [AGE, ILL], 0.05)
    assert list(found.index) == [n for n in range(100) if n not in (3, 10, 11, 50, 70)]
    assert (found["age"] == good["age"].loc[found.index]).all()
    assert str(skipped) == (
        "skipped 5 of 100 records: 1 of more or fewer cells than the header, 2 not a finite number, "
        "1 coded in an unknown way, 1 without a value"
    )


@pytest.mark.parametrize("tolerance", [0.0, 0.049])
def test_beyond_the_tolerated_share_a_table_is_refused(tolerance: float, tmp_path: Path) -> None:
    """One row more than the study tolerates: every mistake is named, and no cell."""
    rows = [f"{20 + i},{i % 2}" for i in range(100)]
    for number in (3, 10, 11, 50, 70):
        rows[number] = f"x{SECRET},1"
    path = csv(tmp_path, "age,ill\n" + "\n".join(rows) + "\n")
    with pytest.raises(InputError) as error:
        read_some(Source("a", path), [AGE, ILL], tolerance)
    assert "5 of 100 rows (rows 4, 11, 12, 51, 71) are not a finite number" in str(error.value)
    assert ("tolerates 4.90% of the rows" in str(error.value)) == (tolerance > 0)
    assert SECRET not in str(error.value)


def test_what_is_wrong_with_a_whole_column_is_never_tolerated(tmp_path: Path) -> None:
    """A column that is absent, and a table of bad rows alone, are refused whatever is tolerated."""
    path = csv(tmp_path, "age\n20\n")
    with pytest.raises(InputError, match="there is no such column"):
        read_some(Source("a", path), [AGE, ILL], 0.9)
    with pytest.raises(InputError, match="not a finite number"):
        read_some(Source("a", csv(tmp_path, "age\nx\n")), [AGE], 0.999)


def test_codes_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    """A canonical value that the study does not list, with the nearest; scale on a categorical column."""
    path = csv(tmp_path, "sex,ill\nM,1\n")
    mapping: dict[str, Any] = {
        "format": 1,
        "columns": {"sex": {"codes": {"M": "mal"}}, "ill": {"scale": 2.0}},
    }
    message = refusal(Source("a", path, mapping), SEX, ILL)
    assert "codes lead to 'mal', which the study does not list, did you mean 'male'?" in message
    assert "column 'ill': is not a number in this study" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"age\n", "has no rows"),
        ("t.csv", b"age,sex\n1,2\n4711.25,2,3\n", "row 2 has more or fewer cells"),
        ("t.csv", b"age,sex\n1,2\n4711.25\n", "row 2 has more or fewer cells"),
        ("t.csv", b"age,sex\n\xff\xfe4711.25,2\n", "encoding"),
        ("t.csv", b"age;sex\n1;4711.25\n", "separator"),
        ("t.csv", b"age,age\n1,4711.25\n", "2 columns have this name"),
        ("t.csv.gz", b"4711.25", "damaged"),
        ("t.parquet", b"4711.25", "damaged"),
        ("t.parquet", b"", "is empty"),
        ("t.xlsx", b"4711.25", "kind of file"),
    ],
)
def test_a_bad_file_is_refused_with_its_cause(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    """Empty, ragged, ill-encoded, damaged and unknown files each say what is wrong, and no cell."""
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(Source("north", path), AGE)
    assert words in message
    assert "north" in message
    assert str(path) in message
    assert SECRET not in message


def test_a_file_or_a_database_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file, no data at all, two sources, no variable, no SQLite file (which is not created), no driver."""
    absent = tmp_path / "absent.db"
    monkeypatch.setenv("ABSENT", f"sqlite:///{absent}")

    def sql(url: str) -> dict[str, Any]:
        return {"format": 1, "source": {"sql": "SELECT 1", "url": url}}

    assert "no such file" in refusal(Source("a", tmp_path / "t.csv"), AGE)
    assert "has no data" in refusal(Source("a"), AGE)
    assert "keep one of them" in refusal(Source("a", tmp_path / "t.csv", sql("env:ABSENT")), AGE)
    assert "NO_SUCH_VARIABLE is not set" in refusal(Source("a", mapping=sql("env:NO_SUCH_VARIABLE")), AGE)
    assert "no SQLite file" in refusal(Source("a", mapping=sql("env:ABSENT")), AGE)
    assert not absent.exists()
    assert "no driver for 'klingon'" in refusal(Source("a", mapping=sql("klingon://host/db")), AGE)


def test_a_databases_refusal_keeps_its_words_at_the_site(tmp_path: Path) -> None:
    """A failing query: the message names the kind of failure, what the database said is a note for the operator."""
    with sqlite3.connect(tmp_path / "t.db") as connection:
        connection.execute("CREATE TABLE t AS SELECT 1 AS age")
    connection.close()
    query = "SELECT nothing_4711 FROM t"
    mapping = {"format": 1, "source": {"sql": query, "url": f"sqlite:///{tmp_path / 't.db'}"}}
    with pytest.raises(InputError, match=r"the database refused \(OperationalError\)") as caught:
        read(Source("a", mapping=mapping), [AGE])
    assert "4711" not in str(caught.value)
    assert "4711" in "".join(caught.value.__notes__)


def test_most_values_outside_the_range_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A forgotten unit conversion is said in the site's log; a single outlier is not."""
    read(Source("a", csv(tmp_path, "age\n500\n600\n7\n")), [AGE])
    assert "check the unit" in caplog.text
    assert "site 'a'" in caplog.text
    caplog.clear()
    read(Source("a", csv(tmp_path, "sex,age\nM,\nF,NA\n")), [AGE, SEX])
    assert "column 'age': no row has a value" in caplog.text
    caplog.clear()
    read(Source("a", csv(tmp_path, "age\n500\n60\n7\n")), [AGE])
    read(Source("a", csv(tmp_path, "sex\nM\nF\n")), [SEX])
    assert "check the unit" not in caplog.text
    assert "may lack codes" in caplog.text


def test_nested_cells_are_refused(tmp_path: Path) -> None:
    """A Parquet column of lists is no column of values."""
    pd.DataFrame({"sex": [["male"]], "age": [[1]]}).to_parquet(tmp_path / "t.parquet")
    message = refusal(Source("a", tmp_path / "t.parquet"), SEX, AGE)
    assert "nested" in message
    assert "column 'age'" in message
