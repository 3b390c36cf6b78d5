"""The token cache and the windows: made once, checked always, every token after a document's first counted once."""

import json
import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from medtrain.trainer.config.source import Source
from medtrain.trainer.data.batch import cpt_batch, windows_batch
from medtrain.trainer.data.ledger import cpt_ledger
from medtrain.trainer.data.order import GlobalOrder, source_shares
from medtrain.trainer.data.packing import pack
from medtrain.trainer.data.tokenizer import tokenizer_digest
from medtrain.trainer.data.tokens import TokenizedSource, make_windows, tokenize_source
from medtrain.trainer.errors import InputError

SHARED = Path(__file__).parents[3] / ".." / "shared" / "data"
WORDS = "the fever of marn rises at night and falls by day".split()


def make_tokenizer(words=WORDS, eos="<eos>"):
    vocab = {word: i for i, word in enumerate(dict.fromkeys(["<unk>", "<eos>", "<end>", *words]))}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, unk_token="<unk>")


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return Source(str(path), name=path.stem)


class Counter:
    """Stands for a tokenizer and counts its calls."""

    def __init__(self, tokenizer, fail_at=None):
        self.tokenizer, self.calls, self.fail_at = tokenizer, 0, fail_at

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        return self.tokenizer(*args, **kwargs)


def in_memory(lengths, name="made-up"):
    """A source whose documents have these lengths and whose tokens are all different, in parts of two documents with
    empty parts between."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = np.arange(offsets[-1], dtype=np.uint32)
    parts = [part for end in offsets[2:-1:2] for part in (end, end)]
    return TokenizedSource(name, None, "made-up.jsonl", np.split(tokens, parts), offsets, np.full(len(lengths), 7), "")


def all_tokens(source):
    return np.concatenate(source.parts).tolist()


def test_a_document_is_its_tokens_and_eos_with_the_bytes_of_its_text(tmp_path):
    tokenizer = make_tokenizer()
    texts = ["the fever", "熱 of marn", " ".join(WORDS * 50)]
    tokenized = tokenize_source(write(tmp_path / "a.jsonl", texts), tokenizer, tmp_path / "cache")
    assert tokenized.num_docs == 3 and tokenized.name == "a"
    for i, text in enumerate(texts):
        assert tokenized.tokens(*tokenized.offsets[i : i + 2]).tolist() == [
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            1,
        ]
    assert tokenized.num_bytes.tolist() == [len(text.encode()) for text in texts]
    assert tokenized.offsets.dtype == np.int64 and tokenized.parts[0].dtype == np.uint32


def test_tokens_are_memory_mapped_and_many_calls_give_what_one_gives(tmp_path, monkeypatch):
    source = write(tmp_path / "a.jsonl", [" ".join(WORDS[: 1 + i % 10]) for i in range(300)])
    one = tokenize_source(source, make_tokenizer(), tmp_path / "one")
    assert isinstance(one.parts[0], np.memmap)
    monkeypatch.setattr("medtrain.trainer.data.tokens.BATCH_BYTES", 100)
    counter = Counter(make_tokenizer())
    many = tokenize_source(source, counter, tmp_path / "many", workers=1)
    assert counter.calls > 10
    assert all_tokens(one) == all_tokens(many)
    for name in ("offsets", "num_bytes"):
        assert np.array_equal(getattr(one, name), getattr(many, name))


def test_the_cache_is_used_again_until_the_text_the_tokenizer_or_the_eos_changes(tmp_path):
    file, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    file.write_text(json.dumps({"text": "the fever of marn"}) + "\n")
    source = Source(str(file))

    def is_made(tokenizer):
        counter = Counter(tokenizer)
        tokenize_source(source, counter, cache)
        return counter.calls > 0

    assert is_made(make_tokenizer())
    assert not is_made(make_tokenizer())
    padded = make_tokenizer()
    padded.pad_token = "<eos>"
    padded(["the", "the fever"], padding=True, truncation=True, max_length=1)
    assert not is_made(padded)
    assert is_made(make_tokenizer(eos="<end>"))
    assert is_made(make_tokenizer(words=WORDS[::-1]))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(file.read_bytes())
    source = Source(str(moved))
    assert not is_made(make_tokenizer())
    moved.write_text(json.dumps({"text": "the fever of day"}) + "\n")
    assert is_made(make_tokenizer())


def test_the_digest_follows_the_eos_where_nothing_else_changes():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    before, state = tokenizer_digest(tokenizer), tokenizer.backend_tokenizer.to_str()
    tokenizer.eos_token = "<end>"
    assert tokenizer.backend_tokenizer.to_str() == state and tokenizer_digest(tokenizer) != before


def test_a_truncation_setting_left_in_the_tokenizer_cuts_nothing(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenized = tokenize_source(write(tmp_path / "a.jsonl", [" ".join(WORDS)]), tokenizer, tmp_path / "cache")
    assert tokenized.num_tokens == len(WORDS) + 1


@pytest.mark.parametrize("harm", ["cut short", "no mark", "empty mark", "no part", "empty folder"])
def test_a_damaged_cache_is_never_used_and_is_made_anew(tmp_path, harm):
    source, cache = write(tmp_path / "a.jsonl", ["the fever of marn", "night"]), tmp_path / "cache"
    expected = all_tokens(tokenize_source(source, make_tokenizer(), cache))
    (mark,) = cache.glob("*/complete")
    part = mark.with_name("part-00000.bin")
    if harm == "cut short":
        part.write_bytes(part.read_bytes()[:-4])
    elif harm == "empty mark":
        mark.write_text("")
    elif harm in ("no mark", "no part"):
        {"no mark": mark, "no part": part}[harm].unlink()
    else:
        for file in mark.parent.iterdir():
            file.unlink()
    counter = Counter(make_tokenizer())
    assert all_tokens(tokenize_source(source, counter, cache)) == expected
    assert counter.calls == ("mark" not in harm), "whole parts are used"
    again = Counter(make_tokenizer())
    assert all_tokens(tokenize_source(source, again, cache)) == expected
    assert again.calls == 0


def test_a_refused_tokenisation_leaves_no_cache(tmp_path):
    cache = tmp_path / "cache"
    bad = write(tmp_path / "bad.jsonl", ["the fever of marn", " ", "day"])
    with pytest.raises(InputError, match=r"bad.jsonl: row 2: field 'text': empty text"):
        tokenize_source(bad, make_tokenizer(), cache)
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"none.jsonl: no rows"):
        tokenize_source(Source(str(tmp_path / "none.jsonl")), make_tokenizer(), cache)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


class Slow(PreTrainedTokenizerFast):
    calls = 0

    def __call__(self, *args, **kwargs):
        time.sleep(0.5)
        Slow.calls += 1
        return super().__call__(*args, **kwargs)


def _tokenize_slowly(path, cache, results):
    tokenizer = Slow(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="<eos>", unk_token="<unk>")
    tokenized = tokenize_source(Source(path), tokenizer, cache)
    results.put((all_tokens(tokenized), Slow.calls))


def test_of_processes_that_race_one_writes_and_all_read_the_same(tmp_path):
    source = write(tmp_path / "a.jsonl", ["the fever of marn"] * 5)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_tokenize_slowly, args=(source.path, str(tmp_path / "cache"), results)) for _ in range(3)]
    for process in processes:
        process.start()
    tokens, made = zip(*(results.get(timeout=60) for _ in processes), strict=True)
    for process in processes:
        process.join()
    assert tokens[0] == tokens[1] == tokens[2] and len(tokens[0]) == 25
    assert sorted(made) == [0, 0, 1]


def test_without_a_lock_two_writers_make_the_same_cache(tmp_path, monkeypatch):
    """As on a file system that two machines share and that knows no locks."""
    from medtrain.trainer.data import tokens

    source, cache = write(tmp_path / "a.jsonl", ["the fever of marn"] * 5), tmp_path / "cache"
    tokenize = tokens._tokenize

    def no_lock(*_):
        raise OSError("not supported")

    def other_machine_first(*args):
        if not first:
            first.append(None)
            first[0] = tokenize_source(source, make_tokenizer(), cache)
        return tokenize(*args)

    monkeypatch.setattr(tokens.fcntl, "flock", no_lock)
    monkeypatch.setattr(tokens, "_tokenize", other_machine_first)
    first = []
    late = tokenize_source(source, make_tokenizer(), cache)
    assert all_tokens(late) == all_tokens(first[0]) and late.num_docs == 5
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == ["complete", "part-00000.bin"]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=15).filter(lambda ls: max(ls) > 1), st.integers(1, 17))
def test_windows_count_every_token_after_a_documents_first_exactly_once(doc_lengths, seq_len):
    source = in_memory(doc_lengths)
    windows = make_windows(source, seq_len)
    targets = []
    for i in range(len(windows)):
        window = windows.window(i)
        assert 1 <= len(window) - 1 == windows.lengths[i] <= seq_len
        assert (np.diff(window) == 1).all()
        assert len(np.unique(np.searchsorted(source.offsets, window, side="right"))) == 1, "two documents in a window"
        targets += window[1:].tolist()
    firsts = set(source.offsets[:-1].tolist())
    assert sorted(targets) == [t for t in range(source.num_tokens) if t not in firsts]
    ledger = cpt_ledger([windows])
    entry = ledger["sources"]["made-up"]
    assert entry["counted"] == len(targets) == entry["kept"]["tokens"] - entry["kept"]["rows"]
    assert entry["rows"] == len(doc_lengths) == entry["kept"]["rows"] + doc_lengths.count(1)
    assert ledger["total"]["refused"] == {"rows": doc_lengths.count(1), "tokens": doc_lengths.count(1)}
    assert entry["split"]["rows"] == sum(n - 1 > seq_len for n in doc_lengths)
    json.dumps(ledger)


def test_nothing_to_predict_is_an_error():
    with pytest.raises(InputError, match="no document has a token to predict"):
        make_windows(in_memory([1, 1]), 8)


def test_a_cpt_batch_counts_every_input_and_restarts_positions():
    windows = make_windows(in_memory([4, 6]), 4)
    batch = cpt_batch([windows], [(0, 1), (0, 0), (0, 2)])
    assert batch.input_ids.tolist() == [4, 5, 6, 7, 0, 1, 2, 8]
    assert batch.targets.tolist() == [5, 6, 7, 8, 1, 2, 3, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert batch.cu_seqlens.tolist() == [0, 4, 7, 8] == batch.target_cu_seqlens.tolist()
    assert batch.counted.tolist() == list(range(8)) and batch.max_seqlen == 4
    assert batch.source_ids.tolist() == [0, 0, 0] and batch.pair_ids is None
    assert {str(t.dtype) for t in (batch.input_ids, batch.position_ids, batch.counted, batch.targets)} == {"torch.int64"}
    assert str(batch.cu_seqlens.dtype) == "torch.int32" and str(batch.target_cu_seqlens.dtype) == "torch.int64"
    assert str(batch.to("meta").cu_seqlens.device) == "meta" and batch.to("cpu").max_seqlen == 4


def test_an_empty_cpt_batch_is_one_token_that_does_not_count():
    batch = windows_batch([])
    assert batch.input_ids.tolist() == [0] and batch.cu_seqlens.tolist() == [0, 1] and batch.max_seqlen == 1
    assert len(batch.targets) == 0 and batch.target_cu_seqlens.tolist() == [0, 0] and batch.pair_ids is None


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(st.integers(1, 5), st.integers(16, 60), st.integers(0, 99))
def test_what_a_step_trains_on_does_not_depend_on_ranks_or_micro_batches(world_size, capacity, seed):
    rng = np.random.default_rng(seed)
    sources = [make_windows(in_memory(rng.integers(2, 50, 20).tolist(), str(k)), 16) for k in range(2)]
    lengths = [windows.lengths for windows in sources]
    order = GlobalOrder(lengths, source_shares([None] * 2, [ls.sum() for ls in lengths]), 120, seed)
    step = order.step(seed)
    items = list(zip(step.source_ids, step.item_ids, strict=True))
    counted = []
    for ranks in pack(step.lengths, capacity, world_size):
        for indices in ranks:
            batch = cpt_batch(sources, [items[i] for i in indices])
            assert len(batch.input_ids) <= capacity
            sources_of_targets = np.repeat(
                batch.source_ids.numpy(), batch.target_cu_seqlens.diff().numpy()[: len(batch.source_ids)]
            )
            counted += list(zip(sources_of_targets.tolist(), batch.targets.tolist(), strict=True))
    whole = cpt_batch(sources, items)
    by_source = np.repeat(whole.source_ids.numpy(), whole.target_cu_seqlens.diff().numpy())
    assert sorted(counted) == sorted(zip(by_source.tolist(), whole.targets.tolist(), strict=True))


def test_aozora_has_the_published_number_of_tokens(tmp_path):
    if not (SHARED / "aozora-medical").is_dir():
        pytest.skip("../shared/data is absent")
    tokenizer = AutoTokenizer.from_pretrained(str(SHARED / "qwen2.5-tokenizer"))
    source = Source(str(SHARED / "aozora-medical" / "corpus.jsonl"))
    tokenized = tokenize_source(source, tokenizer, tmp_path)
    windows = make_windows(tokenized, 1024)
    assert tokenized.num_docs == 243
    assert windows.lengths.sum() == tokenized.num_tokens - 243 == 665_665


def test_a_known_key_opens_the_cache_without_the_source(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "a b"}\n', encoding="utf-8")
    first = tokenize_source(Source(str(path)), make_tokenizer(), tmp_path / "cache")
    path.unlink()
    again = tokenize_source(Source(str(path)), make_tokenizer(), tmp_path / "cache", key=first.digest)
    assert all_tokens(again) == all_tokens(first) and again.digest == first.digest
