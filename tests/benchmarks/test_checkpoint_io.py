"""The benchmark of checkpoints: a small one through all its parts, and a cap that does refuse memory."""

from medtrain.benchmarks.checkpoint_io import MIB, SIZES, load_prove_export, on_ranks, write_checkpoint

LARGEST_TENSOR = 4 * 4096 * 1024


def test_shares_add_up_and_a_cap_below_one_is_refused(tmp_path):
    size = write_checkpoint(tmp_path, SIZES | {"num_hidden_layers": 2, "vocab_size": 4096})
    assert 120 * MIB < size < 200 * MIB
    found = on_ranks(2, load_prove_export, tmp_path, size // 2 + 400 * MIB)
    assert sum(rank["share"] for rank in found) == size
    for rank in found:
        assert size // 2 <= rank["load"] < size // 2 + LARGEST_TENSOR
    source, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("source", "out"))
    assert source == out
    (alone,) = on_ranks(1, load_prove_export, tmp_path, size // 2)
    assert alone.startswith("RuntimeError") and "allocate" in alone
