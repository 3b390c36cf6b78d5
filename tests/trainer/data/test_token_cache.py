"""The token cache: the same bits from any number of workers, after any kill; what is trusted and what is found."""

import json
import logging
import os
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import killed_in_a_child
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from medtrain.trainer.config.source import Source
from medtrain.trainer.data import tokens
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.tokens import TokenizedSource, default_workers, files_digest, make_windows, tokenize_source
from medtrain.trainer.errors import InputError

WORDS = "the fever of marn rises at night and falls by day".split()


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of about 600 bytes of text, of several batches."""
    monkeypatch.setattr(tokens, "PART_BYTES", 600)
    monkeypatch.setattr(tokens, "BATCH_BYTES", 250)


class Counting(PreTrainedTokenizerFast):
    """A word-level tokenizer that counts its calls in this process."""

    calls = 0

    def __call__(self, *args, **kwargs):
        type(self).calls += 1
        return super().__call__(*args, **kwargs)


def make_tokenizer(kind=Counting):
    vocab = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Counting.calls = 0
    return kind(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(n)]


def write(path, rows):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows), "utf-8")
    return path


def save_arrow(path, rows, rows_a_batch):
    table = pa.table({"text": rows})
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    return path


def corpus(folder):
    """A folder of all kinds: large and small files, one with several row groups; and its texts in order."""
    folder.mkdir()
    parts = [texts(90, 0), texts(2, 1), texts(3, 2), texts(70, 3), texts(40, 4)]
    write(folder / "a.jsonl", parts[0])
    write(folder / "b.jsonl", parts[1])
    write(folder / "c.jsonl", parts[2])
    pq.write_table(pa.table({"text": parts[3], "id": range(70)}), folder / "d.parquet", row_group_size=9)
    write(folder / "e.jsonl", parts[4])
    return Source(str(folder)), [text for part in parts for text in part]


def cache_files(cache):
    """Every file of the one cache in a folder: name and bytes."""
    (folder,) = (path for path in Path(cache).iterdir() if path.is_dir())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def decoded(source):
    ids = {i: word for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    return [" ".join(ids[token] for token in source.tokens(*source.offsets[i : i + 2])) for i in range(source.num_docs)]


def test_parts_hold_about_so_many_bytes_of_text_and_follow_the_rows(tmp_path, small_parts):
    source, expected = corpus(tmp_path / "corpus")
    made = tokenize_source(source, make_tokenizer(), tmp_path / "cache", workers=1)
    assert len(made.parts) > 10 and decoded(made) == [f"{text} <eos>" for text in expected]
    ends = np.searchsorted(made.offsets, np.cumsum([len(part) for part in made.parts]))
    sizes = [int(size.sum()) for size in np.split(made.num_bytes, ends[:-1])]
    assert all(600 <= size < 1100 for size in sizes[:-1]) and 0 < sizes[-1] < 1100


def test_any_number_of_workers_makes_the_same_bits_in_the_order_of_the_rows(tmp_path, small_parts, monkeypatch, caplog):
    source, expected = corpus(tmp_path / "corpus")
    alone = tokenize_source(source, make_tokenizer(), tmp_path / "one", workers=1)
    assert decoded(alone) == [f"{text} <eos>" for text in expected] and len(alone.parts) > 10
    assert alone.num_bytes.tolist() == [len(text.encode()) for text in expected]
    assert Counting.calls > 0
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.delattr(tokens, "_tokenize")  # here, not in the workers
        patch.setattr(tokens, "PROGRESS_SECONDS", 0)
        plain = make_tokenizer(PreTrainedTokenizerFast)
        many = tokenize_source(source, plain, tmp_path / "two", workers=2)
    assert cache_files(tmp_path / "one") == cache_files(tmp_path / "two")
    assert many.digest == alone.digest and decoded(many) == decoded(alone)
    told = [int(line.split()[1]) for line in caplog.messages]
    assert told == sorted(told) and len(told) > 10 and len(expected) - 30 < told[-1] <= len(expected)
    assert caplog.messages[-1].startswith(f"corpus: {told[-1]} documents tokenised, 0.00 GB of text, ")


def test_a_dataset_folder_is_divided_by_rows(tmp_path, small_parts):
    folder = tmp_path / "saved"
    folder.mkdir()
    save_arrow(folder / "data-0.arrow", texts(80), 1000)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    tokenized = tokenize_source(Source(str(folder)), make_tokenizer(), tmp_path / "cache", workers=1)
    assert len(tokenized.parts) > 3 and decoded(tokenized) == [f"{text} <eos>" for text in texts(80)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_the_first_bad_row_is_named_whoever_meets_it(tmp_path, small_parts, num_workers):
    tokenizer = make_tokenizer(PreTrainedTokenizerFast)
    rows = texts(120)
    rows[70] = rows[100] = " "
    file = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(InputError) as caught:
        tokenize_source(Source(str(file)), tokenizer, tmp_path / "cache", workers=num_workers)
    assert str(caught.value) == f"{file}: row 71: field 'text': empty text (found ' ')"
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    file.write_bytes(file.read_bytes().replace(b'{"text": " "}', b'{"text": " ', 1))
    with pytest.raises(InputError, match="row 71: not valid JSON"):
        tokenize_source(Source(str(file)), tokenizer, tmp_path / "cache", workers=num_workers)


def test_rows_of_parquet_and_arrow_are_named_in_divided_files(tmp_path, small_parts):
    rows = [*texts(60), None, *texts(20)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=8)
    with pytest.raises(InputError, match="a.parquet: row 61: field 'text': wrong type .found null"):
        tokenize_source(Source(str(tmp_path / "a.parquet")), make_tokenizer(), tmp_path / "cache", workers=1)
    folder = tmp_path / "saved"
    folder.mkdir()
    save_arrow(folder / "data-0.arrow", rows, 1000)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    with pytest.raises(InputError, match="data-0.arrow: row 61: field 'text': wrong type .found null"):
        tokenize_source(Source(str(folder)), make_tokenizer(), tmp_path / "cache", workers=1)


def _die_in_a_call(source, cache, wanted):
    class Dying(Counting):
        def __call__(self, *args, **kwargs):
            if self.calls == wanted:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(*args, **kwargs)

    tokenize_source(source, make_tokenizer(Dying), cache, workers=1)


@pytest.mark.parametrize("wanted", [1, 8, 20])
def test_after_a_kill_only_the_missing_parts_are_made_and_nothing_is_left_over(tmp_path, small_parts, wanted):
    source, _ = corpus(tmp_path / "corpus")
    whole = tokenize_source(source, make_tokenizer(), tmp_path / "whole", workers=1)
    calls = Counting.calls
    killed_in_a_child(_die_in_a_call, source, tmp_path / "cache", wanted)
    there = [name for name in cache_files(tmp_path / "cache") if name.startswith("part") and name.endswith(".bin")]
    assert any(name.endswith(".partial") for name in cache_files(tmp_path / "cache"))
    again = tokenize_source(source, make_tokenizer(), tmp_path / "cache", workers=1)
    assert len(there) >= wanted // 3 - 1, "two or three calls per part"
    assert calls - wanted <= Counting.calls <= calls - 2 * len(there)
    assert cache_files(tmp_path / "cache") == cache_files(tmp_path / "whole")
    assert decoded(again) == decoded(whole)


def test_of_a_damaged_cache_only_the_damaged_part_is_made_anew(tmp_path, small_parts):
    source, _ = corpus(tmp_path / "corpus")
    first = tokenize_source(source, make_tokenizer(), tmp_path / "cache", workers=1)
    expected, before = decoded(first), cache_files(tmp_path / "cache")
    folder = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    victim = folder / "part-00004.bin"
    victim.write_bytes(victim.read_bytes()[:-4])
    again = tokenize_source(source, make_tokenizer(), tmp_path / "cache", workers=1)
    assert 1 <= Counting.calls <= 3 and decoded(again) == expected and cache_files(tmp_path / "cache") == before
    changed = {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != times[path.name]}
    assert changed == {"part-00004.bin", "complete"}


@pytest.fixture
def hashed(monkeypatch):
    """The names of the files that were read to be hashed."""
    found = []
    original = tokens.open_bytes
    monkeypatch.setattr(tokens, "open_bytes", lambda file: (found.append(Path(file).name), original(file))[1])
    return found


def test_unchanged_input_is_hashed_once(tmp_path, monkeypatch, hashed):
    monkeypatch.setattr(tokens, "_SETTLED_NS", -(2**62))  # files just written count as settled
    memory = tmp_path / "raw-files.json"
    paths = [write(tmp_path / name, texts(3)) for name in ("a.jsonl", "b.jsonl")]
    files = [str(path) for path in paths]
    first = files_digest(files, memory)
    assert sorted(hashed) == ["a.jsonl", "b.jsonl"] and files_digest(files, memory) == first and len(hashed) == 2
    # Another content of the same size, given the old date: the system's own time of change tells.
    times = paths[1].stat()
    paths[1].write_bytes(paths[1].read_bytes().replace(b"e", b"a"))
    os.utime(paths[1], ns=(times.st_atime_ns, times.st_mtime_ns))
    second = files_digest(files, memory)
    assert second != first and len(hashed) == 4 and files_digest(files, memory) == second and len(hashed) == 4
    memory.write_text("{")
    assert files_digest(files, memory) == second and len(hashed) == 6


def test_of_a_file_that_changed_just_now_nothing_is_remembered(tmp_path, hashed):
    file, memory = str(write(tmp_path / "a.jsonl", texts(3))), tmp_path / "raw-files.json"
    assert files_digest([file], memory) == files_digest([file], memory)
    assert hashed == ["a.jsonl"] * 2 and not memory.exists()


class Positions:
    """Stands for a huge part: every token is its own place in the source, above what 32 bits hold."""

    def __init__(self, start, size):
        self.start, self.size = start, size

    def __len__(self):
        return self.size

    def __getitem__(self, cut):
        begin, end, _ = cut.indices(self.size)
        return np.arange(self.start + begin, self.start + end)


def test_places_beyond_32_bits_are_found():
    lengths = np.array([5, 2**31 + 3, 2**30, 2**31 - 1, 7, 2**31 + 9, 4], dtype=np.uint32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    assert offsets[-1] > 2**32
    edges = [0, 2, 4, 4, 6, 7]
    parts = [Positions(int(offsets[a]), int(offsets[b] - offsets[a])) for a, b in zip(edges, edges[1:], strict=False)]
    source = TokenizedSource("huge", None, "huge", parts, offsets, lengths, "")
    assert source.num_tokens == offsets[-1]
    assert source.tokens(*offsets[6:8]).tolist() == list(range(offsets[6], offsets[7]))
    windows = make_windows(source, 2**20)
    ends = offsets[1:] - 1
    assert windows.lengths.sum(dtype=np.int64) == int(offsets[-1]) - len(lengths)
    for doc in range(len(lengths)):
        for i in {int(windows.first[doc]), int(windows.first[doc + 1]) - 1}:
            window = windows.window(i)
            start = int(offsets[doc]) + (i - int(windows.first[doc])) * 2**20
            assert window[0] == start and window[-1] == min(start + 2**20, ends[doc])
            assert len(window) == windows.lengths[i] + 1


def test_an_epoch_beyond_32_bits_holds_every_window_once():
    lengths = [np.full(5000, 2**20, np.int32), np.full(900, 2**20 - 1, np.int32)]
    order = GlobalOrder(lengths, source_shares([9, 1], [1, 1]), 2**30, 3)
    assert order.totals[0] > 2**32
    taken = np.concatenate([(step := order.step(s)).item_ids[step.source_ids == 0] for s in range(12)])
    for epoch in range(2):
        assert sorted(taken[epoch * 5000 : (epoch + 1) * 5000]) == list(range(5000))
    late = order.step(10**7)
    assert (
        len(late.lengths) and (late.lengths == [lengths[s][i] for s, i in zip(late.source_ids, late.item_ids, strict=True)]).all()
    )


def test_workers_are_the_cpus_less_the_ranks_that_wait(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert [default_workers(n) for n in (1, 8, 16, 99)] == [16, 9, 1, 1]
