"""Small tokenizers of the kinds that published models have, and their folders."""

import functools
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "高熱 と 咳 が ある 患者 に は まず 胸部 X 線 を 撮る 。",
    "The patient has a fever and a dry cough .",
    "問題: 正しい の は どれ か 。\n説明: 腎 の 低形成 による 。\n答え: a",
    "1234 567 mg/dL 2024年 ガス壊疽 ｶﾞｽ ㎎ Ａ",
] * 20
SPECIALS = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def put_bos(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def byte_level(add_prefix_space=False) -> Tokenizer:
    t = Tokenizer(models.BPE())
    t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    t.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    )
    return t


def digits() -> Tokenizer:
    """Byte-level, with a way of its own to cut text: numbers by three."""
    t = byte_level()
    t.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\p{N}]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return t


def _sentencepiece_bpe() -> Tokenizer:
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return t


def prepend() -> Tokenizer:
    """As Llama-2's and Mistral-7B's tokenizer.json."""
    t = _sentencepiece_bpe()
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIALS, *BYTES], show_progress=False))
    return t


def metaspace(scheme="first") -> Tokenizer:
    """As transformers' converter writes Llama's since."""
    t = _sentencepiece_bpe()
    t.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    t.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=500, special_tokens=[*SPECIALS, *BYTES], show_progress=False))
    return t


def unigram(normalizer=None) -> Tokenizer:
    t = Tokenizer(models.Unigram())
    if normalizer is not None:
        t.normalizer = normalizer
    t.pre_tokenizer, t.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    t.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False)
    )
    return t


def wordpiece() -> Tokenizer:
    t = Tokenizer(models.WordPiece(unk_token="<unk>"))
    t.pre_tokenizer, t.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    t.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIALS, show_progress=False))
    return t


def word_level() -> Tokenizer:
    words = dict.fromkeys([*SPECIALS, *" ".join(TEXTS).split()])
    t = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return t


PUTS_BLANK = {
    "prepend": prepend,
    "metaspace first": metaspace,
    "metaspace always": functools.partial(metaspace, "always"),
    "unigram": unigram,
    "byte-level with a blank": functools.partial(byte_level, True),
}
PUTS_NONE = {
    "byte-level": byte_level,
    "metaspace never": functools.partial(metaspace, "never"),
    "wordpiece": wordpiece,
    "word-level": word_level,
}


def save(folder: Path, tokenizer: Tokenizer, *, model_type: str | None = None, **settings) -> Path:
    """Write a tokenizer folder, with the config.json of a model of that type where one is named."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings), encoding="utf-8")
    if model_type is not None:
        config = {"model_type": model_type, "vocab_size": tokenizer.get_vocab_size()}
        (folder / "config.json").write_text(json.dumps(config))
    return folder
