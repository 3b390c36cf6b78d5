"""The command line: every mistake is one clear line and exit status 2, and nothing is left behind."""

import builtins
import errno
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner
from helpers import SIZES, write_jsonl

from medtrain.trainer.cli import main
from medtrain.trainer.exam import scoring


def call(*words):
    result = CliRunner().invoke(main, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def write_config(tree, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return path


def refused(stage, tree, tmp_path, *parts):
    """Run, expect status 2 and one line with all ``parts``; no run folder may be there."""
    result = call(stage, write_config(tree, tmp_path))
    lines = [line for line in result.stderr.splitlines() if line.startswith("medtrain: ")]
    assert result.exit_code == 2, result.stderr
    assert len(lines) == 1 and result.stderr.splitlines()[-1] == lines[0]
    for part in parts:
        assert part in lines[0], lines[0]
    assert not (tmp_path / tree["run"]["out"]).exists()
    return lines[0]


def set_path(tree, dotted, value):
    *sections, last = dotted.split(".")
    for section in sections:
        tree = tree[int(section)] if section.isdigit() else tree.setdefault(section, {})
    tree[last] = value


@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("optim.step", 5, ["optim.step", "unknown key", "'optim.steps'"]),
        ("optim.foo", 5, ["optim.foo", "unknown key", "one of lr, steps"]),
        ("optim.steps", 0, ["optim.steps", "found 0", "1 or more"]),
        ("data.sources.0.path", "nowhere.jsonl", ["nowhere.jsonl", "No such file"]),
        ("model.tokenizer", "nowhere", ["model.tokenizer", "nowhere", "no such folder"]),
        ("optim.micro_batch_tokens", 8, ["optim.micro_batch_tokens", "too small for a window"]),
        ("optim.batch_tokens", 8, ["optim.batch_tokens", "too small"]),
        ("optim.warmup_steps", 6, ["optim.warmup_steps", "below the 6 steps"]),
        ("data.seq_len", 10**6, ["data.seq_len", "max_position_embeddings"]),
        ("model.eos_token", "<stop>", ["model.eos_token", "not in the vocabulary"]),
        ("model.eos_token", "。", ["model.eos_token", "an ordinary token"]),
        ("lora.alpha", 8, ["lora.alpha", "has no effect without adapters", "lora.rank above 0"]),
        ("lora.base", "nf4", ["lora.base", "has no effect without adapters"]),
        ("lora.merge", False, ["lora.merge", "has no effect without adapters"]),
        ("lora.target_modules", ["q_proj"], ["lora.target_modules", "has no effect without adapters"]),
        ("lora.path", "nowhere", ["lora.path", "nowhere", "not a PEFT adapter"]),
        ("lora", {"rank": -1}, ["lora.rank", "found -1"]),
        ("lora", {"rank": 4, "alpha": 0}, ["lora.alpha", "more than 0"]),
        ("lora", {"rank": 4, "path": "a"}, ["lora.rank", "has no effect with lora.path"]),
        ("lora", {"rank": 4, "target_modules": ["lm_head"]}, ["lora.target_modules", "found lm_head", "q_proj, up_proj"]),
        ("lora", {"rank": 4, "target_modules": ["o_proj"] * 2}, ["lora.target_modules", "named twice"]),
        ("lora", {"rank": 4, "base": "nf4"}, ["lora.base", "NF4 blocks", "rows of 16", "multiple of 64"]),
        ("lora", {"rank": 4, "dropout": 0.1}, ["lora.dropout", "not supported", "without dropout"]),
        ("lora", {"r": 4}, ["lora.r", "unknown key", "'lora.rank'"]),
    ],
)
def test_wrong_settings(cpt_tree, tmp_path, setting, value, parts):
    set_path(cpt_tree, setting, value)
    refused("cpt", cpt_tree, tmp_path, *parts)


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": "熱', ["row 3", "not valid JSON"]),
        ('{"text": ""}', ["row 3", "'text'", "empty text"]),
        ('{"text": "  "}', ["row 3", "'text'", "empty text"]),
        ('{"text": 7}', ["row 3", "'text'", "wrong type", "a string"]),
        ('{"txt": "熱"}', ["row 3", "'text'", "missing"]),
        ("[1]", ["row 3", "a JSON object"]),
    ],
)
def test_wrong_documents(cpt_tree, tmp_path, line, parts):
    path = tmp_path / "documents.jsonl"
    path.write_text('{"text": "熱 咳"}\n{"text": "薬 を"}\n' + line + "\n", encoding="utf-8")
    cpt_tree["data"]["sources"][0]["path"] = str(path)
    refused("cpt", cpt_tree, tmp_path, "documents.jsonl", *parts)


GOOD = {"prompt": "熱 の", "chosen": "答え : a", "rejected": "答え : b"}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"rejected": GOOD["chosen"]}, ["row 2", "'rejected'", "the same tokens as 'chosen'"]),
        ({"chosen": ""}, ["row 2", "'chosen'", "empty"]),
        ({"rejected": 3}, ["row 2", "'rejected'", "wrong type"]),
        ({"prompt": None}, ["row 2", "'prompt'", "wrong type"]),
        ({"chosen": "熱 " * 70}, ["row 2", "overlong", "73 tokens", "at most 64"]),
        ({"prompt": [{"role": "user", "content": "熱"}]}, ["row 2", "expected a list, as 'prompt' is"]),
    ],
)
def test_wrong_pairs(rpo_tree, tmp_path, change, parts):
    path = write_jsonl(tmp_path / "p.jsonl", [GOOD, GOOD | change])
    rpo_tree["data"]["pairs"][0]["path"] = str(path)
    rpo_tree["optim"]["batch_pairs"] = 1
    refused("rpo", rpo_tree, tmp_path, "p.jsonl", *parts)


def test_wrong_weights(cpt_tree, rpo_tree, tmp_path):
    assert call("cpt", write_config(cpt_tree, tmp_path)).exit_code == 0
    model = tmp_path / "cpt" / "model"
    rpo_tree["model"] = {"path": str(tmp_path / "copy")}
    shutil.copytree(model, tmp_path / "copy")
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    refused("rpo", rpo_tree, tmp_path, "model.safetensors", "truncated")
    weights.unlink()
    refused("rpo", rpo_tree, tmp_path, "no weights here")
    shutil.copy(model / "model.safetensors", weights)
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    refused("rpo", rpo_tree, tmp_path, "tokenizer does not fit")
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"intermediate_size": 7}))
    refused("rpo", rpo_tree, tmp_path, "wrong shape")


def test_a_run_folder_of_another_run_is_refused(cpt_tree, tmp_path):
    path = write_config(cpt_tree, tmp_path)
    assert call("cpt", path).exit_code == 0
    result = call("cpt", path, "optim.lr=0.5")
    assert result.exit_code == 2 and "another run" in result.stderr and "optim.lr" in result.stderr
    again = call("cpt", path)
    assert again.exit_code == 0 and "already complete" in again.stderr


def test_a_run_folder_that_cannot_be_made_is_told_before_work_begins(cpt_tree, tmp_path):
    (tmp_path / "file").write_text("")
    result = call("cpt", write_config(cpt_tree, tmp_path), f"run.out={tmp_path / 'file' / 'run'}")
    assert result.exit_code == 2 and "'run.out': cannot be made" in result.stderr


def test_export_of_a_checkpoint_is_the_model_of_the_run(cpt_tree, tmp_path):
    cpt_tree["checkpoint"] = {"every": 3}
    assert call("cpt", write_config(cpt_tree, tmp_path)).exit_code == 0
    run = tmp_path / "cpt"
    assert call("export", run, tmp_path / "last").exit_code == 0
    assert (tmp_path / "last" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    assert call("export", run / "checkpoints" / "step-00000003", tmp_path / "third").exit_code == 0
    assert (tmp_path / "third" / "model.safetensors").read_bytes() != (run / "model" / "model.safetensors").read_bytes()
    for words in ((run, tmp_path / "last"), (tmp_path, tmp_path / "x"), (run / "checkpoints" / "step-00000004", tmp_path / "x")):
        assert call("export", *words).exit_code == 2
    assert not (tmp_path / "x").exists()


def test_check_reads_everything_and_writes_no_run(rpo_tree, tmp_path):
    result = call("check", write_config(rpo_tree, tmp_path))
    assert result.exit_code == 0 and "\nOK" in result.stdout and "rpo, 6 steps" in result.stdout
    assert not (tmp_path / "rpo").exists()
    rpo_tree["lora"] = {"rank": 4}
    result = call("check", write_config(rpo_tree, tmp_path))
    assert "lora:   LoRA rank 4, alpha 8 on down_proj" in result.stdout and "parameters trained" in result.stdout
    rpo_tree["data"]["pairs"][0]["path"] = "gone.jsonl"
    assert call("check", write_config(rpo_tree, tmp_path)).exit_code == 2


def test_text_that_the_tokenizer_cannot_spell_is_told(cpt_tree, tmp_path):
    path = write_jsonl(tmp_path / "en.jsonl", [{"text": "fever and cough"} for _ in range(20)])
    cpt_tree["data"]["sources"] = [{"path": str(path), "name": "english"}]
    cpt_tree["optim"]["batch_tokens"] = 32
    result = call("check", write_config(cpt_tree, tmp_path))
    assert result.exit_code == 0 and "of the tokens of english are <unk>" in result.stderr


def test_check_shows_decoded_pairs_with_the_counted_tokens_marked(rpo_tree, tmp_path):
    row = {"prompt": "患者 の 病", "chosen": "は a", "rejected": "は b"}
    rpo_tree["data"]["pairs"] = [{"path": str(write_jsonl(tmp_path / "p.jsonl", [row, row | {"chosen": "は c"}]))}]
    rpo_tree["optim"]["batch_pairs"] = 2
    for share in (True, False):
        rpo_tree["data"]["share_prompts"] = share
        result = call("check", write_config(rpo_tree, tmp_path), "--samples", 2)
        assert result.exit_code == 0
        for chosen in ("a", "c"):
            assert f"\n患者 の 病\n--- chosen\n⟦は {chosen} </s>⟧\n--- rejected\n⟦は b </s>⟧" in result.stdout
        assert "--- p, row 1: 3 prompt, 3 chosen, 3 rejected tokens" in result.stdout
    assert "⟦" not in call("check", write_config(rpo_tree, tmp_path)).stdout


def test_check_shows_decoded_windows_of_which_all_but_the_first_token_counts(cpt_tree, tmp_path):
    rows = [{"text": "患者 の 病 は a"}, {"text": "咳 の 薬"}]
    cpt_tree["data"] |= {"sources": [{"path": str(write_jsonl(tmp_path / "t.jsonl", rows))}], "seq_len": 4}
    cpt_tree["optim"]["batch_tokens"] = 8
    result = call("check", write_config(cpt_tree, tmp_path), "--samples", 3)
    assert result.exit_code == 0
    for text in ("患者⟦の 病 は a⟧", "a⟦</s>⟧", "咳⟦の 薬 </s>⟧"):
        assert text in result.stdout
    assert result.stdout.count("--- t: ") == 3


def test_the_list_of_commands_cuts_no_summary():
    for words in (["--help"], ["bench", "--help"]):
        text = CliRunner().invoke(main, words, terminal_width=80).output
        assert "..." not in text.split("Commands:")[1]


QUESTION = {"problem_text": "熱 は", "choices": ["熱", "咳"], "answer": ["a"], "points": "1", "text_only": True}


@pytest.fixture(scope="module")
def finished(tokenizer_dir, corpus, pairs, tmp_path_factory):
    """A folder with a finished run and its config, an exam, predictions, and a configuration of each command."""
    root = tmp_path_factory.mktemp("finished")
    cpt = {
        "model": {"init": dict(SIZES), "tokenizer": str(tokenizer_dir)},
        "data": {"sources": [{"path": str(corpus)}], "seq_len": 32, "cache": str(tmp_path_factory.mktemp("cache"))},
        "optim": {"steps": 1, "batch_tokens": 200, "micro_batch_tokens": 128},
        "run": {"out": str(root / "run")},
    }
    rpo = {"model": {"path": str(root / "run/model")}, "data": {"pairs": [{"path": str(pairs)}]}, "optim": {"steps": 1}}
    write_jsonl(root / "exam.jsonl", [{"problem_id": f"A{i}", **QUESTION} for i in range(2)])
    write_jsonl(root / "predictions.jsonl", [{"problem_id": f"A{i}", "prediction": "a"} for i in range(2)])
    sample = {"model": str(root / "run/model"), "questions": str(root / "exam.jsonl"), "out": str(root / "pairs.jsonl")}
    cpt["data"]["exam"] = str(root / "exam.jsonl")
    for name, tree in (("cpt", cpt), ("rpo", rpo | {"run": {"out": str(root / "rpo")}}), ("pairs", sample)):
        (root / f"{name}.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True))
    assert call("cpt", root / "cpt.yaml", "data.exam=null").exit_code == 0
    scored = call(
        "score", "--exam", root / "exam.jsonl", "--predictions", root / "predictions.jsonl", "--details", root / "scored.jsonl"
    )
    assert scored.exit_code == 0
    return root


def bad_paths(root, kind, ending):
    """(what is wrong, path): of a file or folder to be read, or of one to be written."""
    (root / "file").write_text("")
    (root / f"folder{ending}").mkdir()
    (root / "locked").mkdir()
    (root / f"broken{ending}").symlink_to("nowhere/at/all")
    yield "under a file", root / "file" / f"x{ending}"
    yield "locked", root / "locked" / f"x{ending}"
    if kind in ("read a file", "read a folder"):
        yield "missing", root / f"missing{ending}"
        yield "a broken link", root / f"broken{ending}"
    if kind in ("read a file", "write a file"):
        yield "a folder", root / f"folder{ending}"
    else:
        yield "a file", root / "file"
    if kind == "write a folder":
        yield "a broken link", root / f"broken{ending}"


def lock(monkeypatch, folder):
    """No permission to anything inside ``folder``, for root too."""

    def refusing(function):
        def refuse(path, *args, **kwargs):
            if str(path).startswith(f"{folder}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return refuse

    for module, name in ((builtins, "open"), (io, "open"), (os, "stat"), (os, "mkdir"), (os, "scandir"), (os, "listdir")):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))


EVAL = "eval --model run/model --exam exam.jsonl --out sat"
SCORE = "score --exam exam.jsonl --predictions predictions.jsonl"
PAIRS = "pairs pairs.yaml"


@pytest.mark.parametrize(
    ("words", "kind", "ending"),
    [
        *((f"{stage} @", "read a file", ".yaml") for stage in ("cpt", "rpo", "check", "plan", "pairs")),
        *((f"check {stage}.yaml model.path=@ model.init=null", "read a folder", "") for stage in ("cpt", "rpo")),
        ("check cpt.yaml model.tokenizer=@", "read a folder", ""),
        ("check cpt.yaml lora.path=@", "read a folder", ""),
        ("check cpt.yaml data.sources.0.path=@", "read a file", ".jsonl"),
        ("check cpt.yaml data.sources.0.path=@", "read a file", ".parquet"),
        ("check cpt.yaml data.heldout=[@]", "read a folder", ""),
        ("check rpo.yaml data.pairs.0.path=@", "read a file", ".jsonl"),
        ("check cpt.yaml data.cache=@", "write a folder", ""),
        ("check cpt.yaml data.exam=@", "read a file", ".jsonl"),
        ("check cpt.yaml data.exam=@", "read a file", ".csv"),
        ("check cpt.yaml eval.exam_demonstrations=@", "read a file", ".jsonl"),
        ("check cpt.yaml eval.exam_mapping=@", "read a file", ".yaml"),
        ("check cpt.yaml eval.exam_prompt=@", "read a file", ".yaml"),
        ("cpt cpt.yaml run.out=@", "write a folder", ""),
        ("rpo rpo.yaml run.out=@", "write a folder", ""),
        ("plan cpt.yaml --sizes @", "read a file", ".json"),
        (f"{PAIRS} model=@", "read a folder", ""),
        (f"{PAIRS} questions=@", "read a file", ".jsonl"),
        (f"{PAIRS} prompt=@", "read a file", ".yaml"),
        (f"{PAIRS} demonstrations=@", "read a file", ".jsonl"),
        (f"{PAIRS} mapping=@", "read a file", ".yaml"),
        (f"{EVAL} --model @", "read a folder", ""),
        (f"{EVAL} --exam @", "read a file", ".jsonl"),
        (f"{EVAL} --out @", "write a folder", ""),
        (f"{EVAL} --prompt @", "read a file", ".yaml"),
        (f"{EVAL} --mapping @", "read a file", ".yaml"),
        (f"{EVAL} --demonstrations @", "read a file", ".jsonl"),
        (f"{SCORE} --exam @", "read a file", ".jsonl"),
        (f"{SCORE} --predictions @", "read a file", ".jsonl"),
        (f"{SCORE} --mapping @", "read a file", ".yaml"),
        (f"{SCORE} --details @", "write a file", ".jsonl"),
        ("compare @ scored.jsonl", "read a file", ".jsonl"),
        ("compare scored.jsonl @", "read a folder", ""),
        ("report @", "read a folder", ""),
        ("report run --exam @", "read a folder", ""),
        ("export @ exported", "read a folder", ""),
        ("export run @", "write a folder", ""),
        ("demo --out @", "write a folder", ""),
        ("demo --seeds 2 --out @", "write a folder", ""),
        ("bench kernels --shapes 4x8x16 --impl medtrain --out @", "write a folder", ""),
        ("bench train --out @", "write a folder", ""),
        ("bench table @", "read a file", ".json"),
    ],
)
def test_a_path_that_cannot_be_used_is_one_line_and_status_2(finished, tmp_path, monkeypatch, words, kind, ending):
    monkeypatch.chdir(finished)
    before = sorted(finished.rglob("*"))
    wrong = list(bad_paths(tmp_path, kind, ending))
    lock(monkeypatch, tmp_path / "locked")
    for problem, path in wrong:
        result = call(*words.replace("@", str(path)).split())
        lines = [line for line in result.stderr.splitlines() if line.startswith("medtrain: ")]
        assert result.exit_code == 2 and len(lines) == 1 and str(tmp_path) in lines[0], (problem, result.stderr)
    assert sorted(finished.rglob("*")) == before


def test_a_file_that_the_program_itself_misses_is_not_told_as_the_users_mistake(finished, monkeypatch):
    def miss(*_):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/etc/internal")

    monkeypatch.setattr(scoring, "run_score", miss)
    monkeypatch.chdir(finished)
    with pytest.raises(FileNotFoundError):
        call(*SCORE.split())


IMPORTS = """
import sys
from medtrain.trainer.cli import main
try:
    main()
except SystemExit as end:
    heavy = [name for name in ("torch", "transformers") if name in sys.modules]
    print(end.code or 0, heavy)
"""


# What `import torch` and `import transformers` cost is seconds: nobody waits for them to be told of a typing slip.
@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("--help", 0),
        *((f"{command} --help", 0) for command in ("cpt", "plan", "pairs", "eval", "report", "export", "bench")),
        *((f"{command} {command}.yaml optim.lrr=1", 2) for command in ("cpt", "rpo", "pairs")),
        *((f"{command} missing.yaml", 2) for command in ("cpt", "check", "plan", "pairs")),
        ("check cpt.yaml optim.lrr=1", 2),
        ("plan cpt.yaml optim.lrr=1", 2),
        ("plan cpt.yaml --sizes qwen2.5-7b", 0),
        (SCORE, 0),
        ("compare scored.jsonl scored.jsonl", 0),
        ("report run", 0),
        ("report missing", 2),
    ],
)
def test_what_reads_no_model_imports_none_of_its_libraries(finished, words, status):
    done = subprocess.run([sys.executable, "-c", IMPORTS, *words.split()], cwd=finished, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{status} []", done.stderr
