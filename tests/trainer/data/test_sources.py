"""Reading rows: formats, compression, folders, URLs, names, and the text of every error."""

import csv
import gzip
import json
import sys
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.sources import check_text, name_sources, read_rows, reading, source_files
from medtrain.trainer.data.tokens import files_digest
from medtrain.trainer.errors import InputError, StopRequested

TEXTS = ["rash of the left arm", "発熱と咳", "a\nb"]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read_texts(path):
    return [check_text(row.fields["text"], row, "text") for row in read_rows(path, ["text"])]


def message(call) -> str:
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save_to_disk(folder, texts, shards=2):
    """As datasets.Dataset.save_to_disk lays a folder out."""
    folder.mkdir()
    names = [f"data-{k:05d}-of-{shards:05d}.arrow" for k in range(shards)]
    for k, name in enumerate(names):
        table = pa.table({"text": texts[k::shards], "other": [1] * len(texts[k::shards])})
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_every_format_gives_the_same_rows(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", [{"text": t, "other": None} for t in TEXTS])
    pq.write_table(pa.table({"other": [1, 2, 3], "text": TEXTS}), tmp_path / "a.parquet")
    assert read_texts(jsonl) == read_texts(tmp_path / "a.parquet") == TEXTS
    assert read_texts(save_to_disk(tmp_path / "saved", TEXTS)) == [TEXTS[0], TEXTS[2], TEXTS[1]]


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESS)
def test_json_and_csv_give_the_same_rows_and_all_text_may_be_compressed(tmp_path, ending):
    long = "長い" * 100_000
    texts = [*TEXTS, long, 'a "quoted", text\r\n']
    rows = [{"id": str(k), "text": text} for k, text in enumerate(texts)]
    with open(tmp_path / "plain.csv", "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["id", "text"])
        writer.writeheader()
        writer.writerows(rows)
    contents = {
        ".csv": (tmp_path / "plain.csv").read_bytes(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".jsonl": write_jsonl(tmp_path / "plain.jsonl", rows).read_bytes(),
    }
    for kind, content in contents.items():
        file = tmp_path / f"data{kind}{ending}"
        file.write_bytes(COMPRESS[ending](content))
        assert [row.fields for row in read_rows(file, ["text"])] == rows, kind
    numbers = [row.number for row in read_rows(tmp_path / f"data.csv{ending}", ["text"])]
    assert numbers == [2, 3, 4, 6, 7], "the line where a row begins"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"id,text\n1,a\n2\n", "row 3: wrong number of columns (found 1; expected 2, as in the first line)"),
        ("a.csv", b'id,text\n1,"a\nb"\n2,"c"d\n', "row 4: not valid CSV: "),
        ("a.csv", b"id,text\n1,a\n\n2,\xff\n", "row 4: invalid UTF-8 (found byte 0xff at byte 3 of the line)"),
        ("a.csv", b"id,text\n1,a\n2,\n", "row 3: field 'text': empty text"),
        ("a.csv", b"id,body\n1,a\n", "row 2: field 'text': missing (found body, id)"),
        ("a.csv", b"id,text\n", "no rows"),
        ("a.json", b'[{"text": "a"}, {"text": 3}]', "row 2: field 'text': wrong type (found a number"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2: wrong row (found a number; expected a JSON object)"),
        ("a.json", b'{"text": "a"}', "wrong file (found an object; expected a list of rows; .jsonl has a row per line)"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "not valid JSON: Extra data"),
    ],
)
def test_bad_csv_and_json_are_named_by_line_or_place(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    assert message(lambda: read_texts(tmp_path / name)).startswith(f"{tmp_path / name}: {words}")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_name_their_rows_and_are_refused_when_cut_or_damaged(tmp_path, ending):
    file = tmp_path / f"a.jsonl{ending}"
    file.write_bytes(COMPRESS[ending](b'{"text": "a"}\n\n{"text": " "}\n'))
    assert message(lambda: read_texts(file)).startswith(f"{file}: row 3: field 'text': empty text")
    whole = COMPRESS[ending]("".join(f'{{"text": "{k}"}}\n' for k in range(999)).encode())
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 8
    checked = [bytes(damaged)] if ending == ".gz" else []  # zstd need not have a checksum
    for content in (whole[:-9], whole[:30], b"plain", *checked):
        file.write_bytes(content)
        assert message(lambda: read_texts(file)).startswith(f"{file}: not a readable {ending[1:]} file (found ")
    file.write_bytes(whole + whole)
    assert len(read_texts(file)) == 2 * 999, "of several members, all"


def test_next_to_jsonl_and_parquet_a_folder_may_hold_other_files(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text\nfrom csv\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "from gz"}'))
    assert read_texts(tmp_path) == ["from csv", "from gz"]
    write_jsonl(tmp_path / "c.jsonl", [{"text": "from jsonl"}])
    (tmp_path / "about.json").write_text('{"rows": 1}')
    with caplog.at_level("INFO"):
        assert read_texts(tmp_path) == ["from jsonl"] == read_texts(tmp_path)
    assert [line for line in caplog.messages if "not read" in line] == [
        f"note: {tmp_path}: not read: a.csv, about.json, b.jsonl.gz"
    ]


@pytest.mark.parametrize("other", ["test-00000-of-00001.jsonl", "validation.jsonl", "dev.jsonl", "Test_1.jsonl"])
def test_a_folder_of_several_splits_is_refused(tmp_path, other):
    write_jsonl(tmp_path / "train-00000-of-00002.jsonl", [{"text": "a"}])
    write_jsonl(tmp_path / "train-00001-of-00002.jsonl", [{"text": "b"}])
    assert read_texts(tmp_path) == ["a", "b"]
    write_jsonl(tmp_path / other, [{"text": "c"}])
    with pytest.raises(InputError, match=r"a folder of several splits \(found (dev|test|train|val), (train|val)"):
        read_texts(tmp_path)


@pytest.fixture
def remote():
    """A file system that is reached by URL; its files have no tag that tells a change."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/bucket", recursive=True)


def test_a_url_is_read_as_a_path_is(tmp_path, remote):
    local = tmp_path / "bucket"
    local.mkdir()
    write_jsonl(local / "a.jsonl", [{"text": text} for text in TEXTS])
    pq.write_table(pa.table({"text": TEXTS}), local / "b.parquet")
    save_to_disk(local / "saved", TEXTS)
    remote.put(str(local), "/bucket", recursive=True)
    for name in ("a.jsonl", "b.parquet", "saved", ""):
        url = f"memory://bucket/{name}"
        assert read_texts(url) == read_texts(local / name), name
        assert files_digest(source_files(url)) == files_digest(source_files(local / name))
    remote.pipe("/bucket/a.jsonl", b'{"text": "a"}\n{"text": 3}\n')
    assert message(lambda: read_texts("memory://bucket/a.jsonl")).startswith(
        "memory://bucket/a.jsonl: row 2: field 'text': wrong"
    )
    assert "memory://bucket/gone: cannot be read" in message(lambda: source_files("memory://bucket/gone"))
    assert name_sources([Source("memory://bucket/a.jsonl.gz")])[0].name == "a"


def test_what_is_at_a_url_is_remembered_by_its_tag_alone(tmp_path, remote, monkeypatch):
    url, memory = "memory://bucket/a.jsonl", tmp_path / "raw-files.json"
    remote.pipe("/bucket/a.jsonl", b'{"text": "a"}\n')
    before = files_digest([url], memory)
    remote.pipe("/bucket/a.jsonl", b'{"text": "b"}\n')
    changed = files_digest([url], memory)
    assert changed != before and not memory.exists()
    info, tag = type(remote).info, "1"
    monkeypatch.setattr(type(remote), "info", lambda self, path, **more: info(self, path, **more) | {"ETag": tag})
    assert files_digest([url], memory) == changed and memory.exists()
    remote.pipe("/bucket/a.jsonl", b'{"text": "c"}\n')
    assert files_digest([url], memory) == changed, "size and tag are the same"
    tag = "2"
    assert files_digest([url], memory) != changed


def test_a_stop_while_a_url_is_read_is_no_mistake(remote):
    remote.pipe("/bucket/a.jsonl", b'{"text": "a"}\n')
    with pytest.raises(StopRequested), reading("memory://bucket/a.jsonl"):
        raise StopRequested


def test_urls_that_cannot_be_read_are_told_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    text = message(lambda: source_files("s3://bucket/a.jsonl"))
    assert text.startswith("s3://bucket/a.jsonl: cannot be read (found Install s3fs")
    assert message(lambda: source_files("nothing://a.jsonl")).startswith(
        "nothing://a.jsonl: cannot be read (found Protocol not known"
    )


def test_a_folder_is_read_in_the_order_of_its_names_without_other_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "second"}])
    pq.write_table(pa.table({"text": ["first"]}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    assert read_texts(tmp_path) == ["first", "second"]
    assert [row.number for row in read_rows(tmp_path, ["text"])] == [1, 1]


def test_byte_order_mark_crlf_and_blank_lines_are_read_over_and_rows_stay_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "three"}')
    assert [(row.number, row.fields["text"]) for row in read_rows(file, ["text"])] == [(1, "one"), (3, "three")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "cut', ["row 2", "not valid JSON", '{"text": "cut']),
        (b"[" * 100_000, ["row 2", "not valid JSON"]),
        (b'["a list"]', ["row 2", "found a list", "expected a JSON object"]),
        (b'{"text": "\xff"}', ["row 2", "invalid UTF-8", "byte 0xff at byte 11"]),
        (b'{"txt": "x", "id": 3}', ["row 2", "field 'text'", "missing", "id, txt"]),
        (b"{}", ["row 2", "field 'text'", "missing", "no fields"]),
        (b'{"text": 3}', ["row 2", "field 'text'", "found a number", "expected a string"]),
        (b'{"text": null}', ["row 2", "field 'text'", "found null", "expected a string"]),
        (b'{"text": true}', ["row 2", "field 'text'", "found a boolean", "expected a string"]),
        (b'{"text": ""}', ["row 2", "field 'text'", "empty text"]),
        (b'{"text": " \\n\\u3000"}', ["row 2", "field 'text'", "empty text"]),
        (b'{"text": "a\\ud800"}', ["row 2", "field 'text'", "surrogate", "\\ud800 at character 2"]),
    ],
)
def test_a_bad_line_is_named_with_file_row_and_field(tmp_path, line, words):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    text = message(lambda: read_texts(file))
    assert text.startswith(f"{file}: row 2: ")
    for word in words:
        assert word in text


def test_bad_parquet_rows_are_named(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x"] * 1500 + [None]}), file)
    assert f"{file}: row 1501: field 'text': wrong type (found null" in message(lambda: read_texts(file))
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), file)
    assert "field 'text': missing (found body, id" in message(lambda: read_texts(file))
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff"))
    pq.write_table(pa.table({"text": bad}), file)
    assert message(lambda: read_texts(file)) == f"{file}: invalid UTF-8 (found byte 0xff in rows 1 to 2)"


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_broken_binary_file_is_named(tmp_path, name):
    (tmp_path / "folder").mkdir()
    file = tmp_path / "folder" / name
    file.write_bytes(b"not what it says")
    (tmp_path / "folder" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    assert f"{file}: not a readable {file.suffix[1:]} file" in message(lambda: read_texts(tmp_path / "folder"))


def test_paths_without_data_are_named(tmp_path):
    assert "gone.jsonl: cannot be read (found No such file" in message(lambda: source_files(tmp_path / "gone.jsonl"))
    assert "the folder holds no data files" in message(lambda: source_files(tmp_path))
    for name in ("a.txt", "a.parquet.gz", "a.gz"):
        (tmp_path / name).write_text("text\n")
        assert f"(found {name}; expected .jsonl, .json, .csv (each" in message(lambda name=name: source_files(tmp_path / name))
    assert "the folder holds no data files" in message(lambda: source_files(tmp_path))
    for content in ("", "\n\n"):
        (tmp_path / "empty.jsonl").write_text(content)
        assert f"{tmp_path / 'empty.jsonl'}: no rows" in message(lambda: read_texts(tmp_path / "empty.jsonl"))
    (tmp_path / "dict" / "train").mkdir(parents=True)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "dataset_dict.json: wrong file (found an object" in message(lambda: read_texts(tmp_path / "dict"))
    save_to_disk(tmp_path / "saved", TEXTS)
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow: not a readable arrow file (found No such" in message(
        lambda: read_texts(tmp_path / "saved")
    )
    (tmp_path / "saved" / "state.json").write_text("{}")
    assert "field '_data_files'" in message(lambda: source_files(tmp_path / "saved"))


def test_names_are_filled_in_and_unique():
    named = name_sources([Source("x/a.jsonl"), Source("y/a.parquet"), Source("z", name="a-2"), Source("a.jsonl")])
    assert [source.name for source in named] == ["a", "a-3", "a-2", "a-4"]
    text = message(lambda: name_sources([Source("x", name="n"), Source("y", name="n")]))
    assert text == "y: field 'name': two sources have this name (found n)"


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_a_weight_must_be_a_number_above_zero(weight):
    assert "field 'weight'" in message(lambda: Source("a.jsonl", weight=weight))


def test_digest_follows_bytes_not_names(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}])
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": "x"}])
    a, b = str(a), str(b)
    before = files_digest([a])
    assert files_digest([b]) == before
    write_jsonl(Path(a), [{"text": "y"}])
    assert files_digest([a]) != before
    assert files_digest([a, b]) != files_digest([b, a])
