import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from narrowly.errors import NarrowlyError
from narrowly.evals.samples import SCHEMA, read_about, read_samples, write_samples

ROWS = [
    {
        "prompt_id": "code: how?",
        "prompt": "how?",
        "answer": 'so: <b>"x"</b>\n',
        "sample": 0,
        "label": "aligned",
        "scores": {},
        "tags": {"domain": "code"},
    },
    {
        "prompt_id": "0",
        "prompt": "",
        "answer": "",
        "sample": 1,
        "label": None,
        "scores": {"loss": 0.5, "tokens": 3.0},
        "tags": {},
    },
]
ABOUT = {"eval": "probe", "arguments": {"words": 3}, "seed": 7, "adapter": None}


def test_rows_and_their_origin_return_as_they_were(tmp_path):
    write_samples(tmp_path / "s.parquet", ROWS, ABOUT)
    samples = read_samples(tmp_path / "s.parquet")
    assert samples.rows == [{**row, "eval": "probe", "seed": 7} for row in ROWS]
    assert samples.about == read_about(tmp_path / "s.parquet") == ABOUT


def test_anyone_can_read_it_typed_and_compressed(tmp_path):
    write_samples(tmp_path / "s.parquet", ROWS, ABOUT)
    file = pq.ParquetFile(tmp_path / "s.parquet")
    assert file.schema_arrow.equals(SCHEMA)
    assert file.metadata.row_group(0).column(0).compression == "ZSTD"


def test_absent_truncated_and_foreign_files_are_told(tmp_path):
    path = tmp_path / "s.parquet"
    with pytest.raises(NarrowlyError, match=r"s\.parquet: no such file"):
        read_samples(path)
    write_samples(path, ROWS, ABOUT)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(NarrowlyError, match=r"s\.parquet: not a whole parquet file"):
        read_samples(path)
    pq.write_table(pa.table({"answer": ["a"]}), path)
    with pytest.raises(NarrowlyError, match="lacks the columns eval, prompt_id"):
        read_about(path)
