"""The ledger: what became of every row and token of every source, as a dict to be written as ``ledger.json``.

For each source: ``rows`` and ``tokens`` read, ``kept``, ``cut`` and ``refused`` by reason, and for CPT ``split``: the
documents longer than the window. Always rows = kept + refused, and tokens = kept + cut + refused (a cut row is kept; its
lost tokens are cut). Tokens of a pair are prompt + chosen + rejected; of a document BOS (if any), text, eos. For pairs also
``noted``: rows that are kept but look wrong, by reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from medtrain.trainer.data.packing import distinct_tokens
from medtrain.trainer.data.pairs import PairSet
from medtrain.trainer.data.tokens import Windows


def cpt_ledger(sources: Sequence[Windows]) -> dict:
    """Return the ledger of CPT sources. ``counted`` are the tokens that are targets in an epoch: all but each first."""
    return _ledger("cpt", {windows.source.name: _documents(windows) for windows in sources})


def pair_ledger(sources: Sequence[PairSet]) -> dict:
    """Return the ledger of preference pairs. ``completion_tokens`` are the targets of an epoch. ``inputs``: tokens that an
    epoch computes with each side after its own prompt (``separate``), with a prompt per pair (``by_pair``), and with each
    distinct prompt and completion once (``distinct``); a run with data.share_prompts lies between the last two."""
    return _ledger("pairs", {pairs.name: _pairs(pairs) for pairs in sources})


def describe(ledger: dict) -> list[str]:
    """Return a line for whatever was cut, refused or noted, by source and reason."""
    lines = []
    for name, source in ledger["sources"].items():
        for outcome in ("cut", "refused"):
            for reason, counts in source[outcome].items():
                lines.append(f"{name}: {outcome}: {reason}: {counts['rows']:,} rows, {counts['tokens']:,} tokens")
        lines += [f"{name}: noted: {reason}: {rows:,} rows" for reason, rows in source.get("noted", {}).items()]
    return lines


def _ledger(kind: str, sources: dict[str, dict]) -> dict:
    entries = sources.values()
    total = _total(entries) | {"kept": _total(source["kept"] for source in entries)}
    for outcome in ("cut", "refused"):
        total[outcome] = _total(counts for source in entries for counts in source[outcome].values())
    return {"kind": kind, "sources": sources, "total": total}


def _total(counts: Iterable[dict]) -> dict:
    counts = list(counts)
    return _counts(sum(c["rows"] for c in counts), sum(c["tokens"] for c in counts))


def _counts(rows, tokens) -> dict:
    return {"rows": int(rows), "tokens": int(tokens)}


def _documents(windows: Windows) -> dict:
    source = windows.source
    num_windows = np.diff(windows.first)
    alone = int(np.sum(num_windows == 0))
    split = num_windows > 1
    return {
        "path": source.path,
        "rows": source.num_docs,
        "tokens": source.num_tokens,
        "bytes": int(source.num_bytes.sum()),
        "kept": _counts(source.num_docs - alone, source.num_tokens - alone),
        "counted": int(windows.lengths.sum(dtype=np.int64)),
        "windows": len(windows),
        "split": {"rows": int(split.sum()), "windows": int(num_windows[split].sum())},
        "cut": {},
        "refused": {"no tokens but eos": _counts(alone, alone)} if alone else {},
    }


def _pairs(pairs: PairSet) -> dict:
    kept = _counts(pairs.num_pairs, len(pairs.tokens))
    cut, refused = ({reason: _counts(*n) for reason, n in counts.items()} for counts in (pairs.cut, pairs.refused))
    prompts, distinct = distinct_tokens(pairs)
    return {
        "path": pairs.path,
        "rows": _total([kept, *refused.values()])["rows"],
        "tokens": _total([kept, *cut.values(), *refused.values()])["tokens"],
        "kept": kept,
        "completion_tokens": int(pairs.completion_lengths.sum()),
        "distinct_prompts": prompts,
        "inputs": {"separate": int(pairs.separate_lengths.sum()), "by_pair": int(pairs.lengths.sum()), "distinct": distinct},
        "cut": cut,
        "refused": refused,
        "noted": pairs.noted,
    }
