"""The benchmark of checkpoints: a small one through all its parts, and a cap that does refuse memory."""

from medtrain.benchmarks import checkpoint_io
from medtrain.benchmarks.checkpoint_io import MIB, SIZES


def test_shares_add_up_and_a_cap_below_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io, "SIZES", SIZES | {"num_hidden_layers": 2, "vocab_size": 4096})
    about = checkpoint_io.write_checkpoint(tmp_path / "source")
    share = about["checkpoint_bytes"] // 2
    assert 120 * MIB < about["checkpoint_bytes"] < 200 * MIB
    found = checkpoint_io._on_ranks(
        2, tmp_path, checkpoint_io.load_prove_export, tmp_path / "source", tmp_path / "out", share + 400 * MIB
    )
    assert sum(rank["share_bytes"] for rank in found) == about["checkpoint_bytes"]
    for rank in found:
        assert share <= rank["load"]["anonymous_bytes"] < share + about["largest_tensor_bytes"]
    source, out = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("source", "out"))
    assert source == out
    (alone,) = checkpoint_io._on_processes([(checkpoint_io._alone, (checkpoint_io.load_alone, (tmp_path / "source", share)))])
    assert alone.startswith("RuntimeError") and "allocate" in alone
