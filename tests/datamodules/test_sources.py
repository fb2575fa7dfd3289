"""Whatever the container, the same records come out; whatever is wrong with it, the message says where it is."""

import bz2
import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from liveselect.datamodules.pools.readers import DataError
from liveselect.datamodules.pools.sources import Source, describe_source, parts_of, read_records

RECORDS = [
    {"text": "eins", "url": "u0", "score": 1},
    {"text": "zwei\nzwei ä", "url": None, "score": 2},
    {"text": "", "url": "u2", "score": 3},
]


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def make_plain(folder):
    (folder / "a.jsonl").write_bytes(json_lines(RECORDS))
    return folder / "a.jsonl"


def make_byte_order_mark(folder):
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + json_lines(RECORDS).replace(b"\n", b"\r\n") + b"\n\n")
    return folder / "a.jsonl"


def make_gzip_of_two_members(folder):
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json_lines(RECORDS[:1])) + gzip.compress(json_lines(RECORDS[1:])))
    return folder / "a.jsonl.gz"


def make_zstd(folder):
    (folder / "a.jsonl.zst").write_bytes(zstd(json_lines(RECORDS)))
    return folder / "a.jsonl.zst"


def make_bz2(folder):
    (folder / "a.ndjson.bz2").write_bytes(bz2.compress(json_lines(RECORDS)))
    return folder / "a.ndjson.bz2"


def make_parquet(folder):
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def make_folder_of_shards(folder):
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "deep" / "a.jsonl").write_bytes(json_lines(RECORDS[:1]))
    pq.write_table(pa.Table.from_pylist(RECORDS[1:]), folder / "deep" / "er" / "b.parquet")
    (folder / "README.txt").write_text("not data")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "c.jsonl").write_text("hidden")
    return folder


def make_pattern(folder):
    make_folder_of_shards(folder)
    return folder / "**" / "[ab].*"


def make_dataset_folder(folder):
    datasets.Dataset.from_list(RECORDS).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def make_dataset_dict_with_one_split(folder):
    datasets.DatasetDict(only=datasets.Dataset.from_list(RECORDS)).save_to_disk(str(folder / "saved"))
    return folder / "saved"


def make_hub(folder):
    (folder / "repository").mkdir()
    pq.write_table(pa.Table.from_pylist(RECORDS), folder / "repository" / "train.parquet")
    return f"hub:{folder / 'repository'}"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


@pytest.mark.parametrize(
    "make",
    [
        make_plain,
        make_byte_order_mark,
        make_gzip_of_two_members,
        make_zstd,
        make_bz2,
        make_parquet,
        make_folder_of_shards,
        make_pattern,
        make_dataset_folder,
        make_dataset_dict_with_one_split,
        make_hub,
    ],
)
def test_every_container_gives_the_same_records(folder, make):
    location = make(folder)
    assert list(read_records(location)) == RECORDS
    assert list(read_records(f"name={location}", ["score"])) == [{"score": record["score"]} for record in RECORDS]
    with pytest.raises(DataError, match=r"no column 'answer', 'prompt'; the columns are .*'text', 'url', 'score'\."):
        list(read_records(location, ["text", "answer", "prompt"]))


def test_text_files_are_records_of_their_text_and_path(folder):
    (folder / "sub").mkdir()
    (folder / "sub" / "b.txt").write_text("zwei ä\r\n", newline="")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfeins")
    (folder / "c.md").write_text("drei")
    (folder / "d.txt.gz").write_bytes(gzip.compress(b"vier"))
    expected = [{"text": "eins", "path": "a.txt"}, {"text": "zwei ä\r\n", "path": "sub/b.txt"}]
    assert list(read_records(folder)) == expected
    assert list(read_records(folder, include=["*.md", "*.gz"])) == [
        {"text": "drei", "path": "c.md"},
        {"text": "vier", "path": "d.txt.gz"},
    ]
    assert list(read_records(folder, ["text"], include=["sub/*"])) == [{"text": "zwei ä\r\n"}]


@pytest.mark.parametrize("large", [False, True])
def test_lists_of_integers_come_out_whole_from_sliced_and_nested_columns(folder, large):
    lists = [[1, 2], [], [3], list(range(50))] * 700
    kind = pa.large_list(pa.uint16()) if large else pa.list_(pa.int64())
    pq.write_table(pa.table({"input_ids": pa.array(lists, kind)}), folder / "a.parquet", row_group_size=997)
    assert [list(record["input_ids"]) for record in read_records(folder)] == lists


def test_keys_and_progress_follow_the_records(folder):
    from liveselect.datamodules.pools.readers import Reading

    for make in (make_plain, make_gzip_of_two_members, make_parquet):
        (part,) = parts_of(Source.parse(make(folder)))
        records = list(part.read(Reading()))
        assert len({record.key for record in records}) == len(RECORDS)
        done = [record.done for record in records]
        assert done == sorted(done)
        assert done[-1] == part.size


def test_a_source_may_be_named(folder):
    path = make_plain(folder)
    assert Source.parse(f"web={path}") == Source("web", str(path))
    assert Source.parse(path).name == "a"
    assert Source.parse("data/**/*.jsonl.gz").name == "data"
    assert Source.parse("hub:allenai/c4:en:train[:1%]").name == "c4"
    os.makedirs(folder / "lang=en")
    assert Source.parse(str(folder / "lang=en")).location == str(folder / "lang=en")


def test_the_description_of_a_source_changes_with_its_files(folder):
    source = Source.parse(make_plain(folder))
    before = describe_source(source, parts_of(source))
    assert before == describe_source(source, parts_of(source))
    with (folder / "a.jsonl").open("ab") as file:
        file.write(b"{}\n")
    assert describe_source(source, parts_of(source)) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        (
            b'[{"text": "a"},\n',
            r"line 1: not valid JSON .*looks like one JSON array: write each of its objects on a line",
        ),
        (b'{"text": "a"}\n\n"b"\n', r"line 3: expected a JSON object such as \{\"text\": \.\.\.\}, got str"),
        (b'{"text": "a"}\n{"txt": "a", "u": 1}\n', r"line 2: no column 'text'; the columns are 'txt', 'u'"),
    ],
)
def test_a_bad_line_is_named(folder, content, message):
    (folder / "a.jsonl").write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(folder / "a.jsonl", ["text"]))


UNDECODABLE = {
    "a.jsonl": (
        b'{"text": "a"}\n{"text": "b\xffc"}\n{"text": "d"}\n',
        r"a\.jsonl, line 2: byte 25 \(0xff\) is not UTF-8",
    ),
    "s.jsonl": (b'{"text": "a"}\n{"text": "b\\ud800c"}\n{"text": "d"}\n', r"s\.jsonl, line 2, column 'text': byte 1 "),
    "b.txt": (b"b\xffc", r"b\.txt: byte 1 \(0xff\) is not UTF-8"),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_undecodable_text_is_an_error_or_replaced_or_left_out(folder, name):
    content, message = UNDECODABLE[name]
    (folder / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_records(folder / name, ["text"]))
    others = [] if name == "b.txt" else ["a", "d"]
    assert [record["text"] for record in read_records(folder / name, ["text"], on_undecodable="skip")] == others
    replaced = [record["text"] for record in read_records(folder / name, ["text"], on_undecodable="replace")]
    assert [text.replace("�", "") for text in replaced if "�" in text] == ["bc"]
    assert [text for text in replaced if "�" not in text] == others


def test_undecodable_strings_in_parquet_are_found_though_arrow_does_not_look(folder):
    data = pa.array([b"a", b"b\xffc"]).cast(pa.binary())
    strings = pa.Array.from_buffers(pa.string(), 2, data.buffers())
    pq.write_table(pa.table({"text": strings}), folder / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 1, column 'text': byte 1 \(0xff\)"):
        list(read_records(folder, ["text"]))
    assert [record["text"] for record in read_records(folder, ["text"], on_undecodable="skip")] == ["a"]


def test_damaged_files_are_named(folder):
    whole = gzip.compress(json_lines(RECORDS * 100))
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (folder / "b.jsonl.gz").write_bytes(b"plain")
    (folder / "c.jsonl.zst").write_bytes(b"plain, not zstd")
    (folder / "d.parquet").write_bytes(b"plain")
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        with pytest.raises(DataError, match=f"{name}: cannot be .*: the file is damaged"):
            list(read_records(folder / name))


def test_what_is_not_there_is_named_with_a_way_out(folder):
    with pytest.raises(DataError, match=r"no such file or folder: '.*nothing'. For a data set .* write hub:"):
        list(read_records(folder / "nothing"))
    with pytest.raises(DataError, match="matches no file: check it, and quote it"):
        list(read_records(folder / "*.jsonl"))
    (folder / "a.py").write_text("x")
    (folder / "b.py").write_text("x")
    with pytest.raises(DataError, match=r"no file that matches .*; it holds \.py \(2\)\. Choose with --include"):
        list(read_records(folder))
    with pytest.raises(DataError, match=r"no file that matches \*\.md; it holds \.py \(2\)"):
        list(read_records(folder, include=["*.md"]))


def test_a_choice_between_splits_is_asked_for(folder):
    part = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=part, test=part).save_to_disk(str(folder / "saved"))
    with pytest.raises(DataError, match=r"several splits: name the folder of one, such as .*saved/train, .*saved/test"):
        list(read_records(folder / "saved"))
    assert list(read_records(folder / "saved" / "test")) == RECORDS


def test_a_hub_name_that_cannot_be_loaded_says_how_to_write_it(folder):
    with pytest.raises(DataError, match=r"could not load .*split 'train'.*Check the name \(hub:NAME:CONFIG:SPLIT\)"):
        list(read_records(f"hub:{folder / 'nothing'}"))
    location = make_hub(folder)
    with pytest.raises(DataError, match="split 'validation'"):
        list(read_records(f"{location}::validation"))
    assert list(read_records(f"{location}::train[:2]")) == RECORDS[:2]


def test_a_parquet_file_is_not_held_in_memory(folder):
    table = pa.table({"text": pa.array(["x" * 1000] * 2000)})
    with pq.ParquetWriter(folder / "a.parquet", table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(20):
            writer.write_table(table)
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in read_records(folder)]
    assert len(held) == 40000
    assert max(held) < (folder / "a.parquet").stat().st_size / 4


def test_missing_values_in_lists_of_integers_stay_missing(folder):
    lists = [[1, 2], None, [3, None], []]
    pq.write_table(pa.table({"ids": pa.array(lists, pa.list_(pa.int64()))}), folder / "a.parquet")
    assert [record["ids"] for record in read_records(folder)] == lists
    pq.write_table(pa.table({"ids": pa.array([[1, 2], None], pa.list_(pa.int64()))}), folder / "a.parquet")
    first, second = [record["ids"] for record in read_records(folder)]
    assert (first.tolist(), first.dtype, second) == ([1, 2], "int64", None)
