"""Whether others read an exported folder as we do: ids, logits and greedy tokens under other versions and in vLLM.

    python -m medtrain.benchmarks.export_readers RUN/model --python PY4 --python PY5 --vllm PY_VLLM

Each interpreter, of an environment of its own, reads the folder with what is installed there, in float32 on the CPU. The
first is what the others are compared with; the exit status is 1 where one differs: ids or greedy tokens at all, log-probs
by more than ``--tolerance`` nats. vLLM gives ids and greedy tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click

TEXTS = ["The patient has a fever of 38.5 °C; give", "高熱と咳のある患者に、まず", "問題: 正しいのはどれか。\n答え: "]

WITH_TRANSFORMERS = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, out, num_tokens, texts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
found = {"reader": "transformers " + transformers.__version__, "ids": [], "logps": [], "greedy": []}
for text in texts:
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
        logps = model(made).logits.log_softmax(-1)[0, :-1].gather(1, made[0, 1:, None])
    found["ids"].append(ids[0].tolist())
    found["logps"].append(logps.flatten().tolist())
    found["greedy"].append(made[0, ids.shape[1]:].tolist())
json.dump(found, open(out, "w"))
"""

WITH_VLLM = """
import json, sys
if __name__ == "__main__":
    import vllm
    folder, out, num_tokens, texts = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
    llm = vllm.LLM(folder, dtype="float32", max_model_len=256, enforce_eager=True, seed=0)
    made = llm.generate(texts, vllm.SamplingParams(temperature=0.0, max_tokens=num_tokens))
    found = {"reader": "vllm " + vllm.__version__, "ids": [list(one.prompt_token_ids) for one in made],
             "greedy": [list(one.outputs[0].token_ids) for one in made]}
    json.dump(found, open(out, "w"))
"""


def read_with(python: str, program: str, folder: Path, num_tokens: int) -> dict:
    """What ``program`` finds in ``folder`` when ``python`` runs it; its messages are shown where it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "read.py", Path(scratch) / "found.json"
        file.write_text(program, encoding="utf-8")
        words = [python, str(file), str(folder.resolve()), str(out), str(num_tokens), json.dumps(TEXTS)]
        done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise click.ClickException(f"{python} cannot read {folder}:\n{done.stdout[-3000:]}")
        return json.loads(out.read_text(encoding="utf-8"))


def differences(first: dict, other: dict) -> dict:
    """Texts whose ids and greedy tokens differ, and the largest difference of a log-prob (nats), where both have it."""
    found = {name: sum(a != b for a, b in zip(first[name], other[name], strict=True)) for name in ("ids", "greedy")}
    if "logps" in other and not found["ids"] and not found["greedy"]:
        logps = [abs(a - b) for x, y in zip(first["logps"], other["logps"], strict=True) for a, b in zip(x, y, strict=True)]
        found["logps"] = max(logps)
    return found


@click.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--python", "pythons", multiple=True, required=True, help="an interpreter with transformers")
@click.option("--vllm", "vllms", multiple=True, help="an interpreter with vLLM")
@click.option("--tokens", "num_tokens", default=16, show_default=True, help="made greedily behind each text")
@click.option("--tolerance", default=1e-4, show_default=True, help="of log-probs, nats")
def main(folder: Path, pythons: tuple[str, ...], vllms: tuple[str, ...], num_tokens: int, tolerance: float) -> None:
    """Read FOLDER, an export, with each interpreter and compare."""
    readers = [(python, WITH_TRANSFORMERS) for python in pythons] + [(python, WITH_VLLM) for python in vllms]
    first, wrong = None, False
    for python, program in readers:
        found = read_with(python, program, folder, num_tokens)
        if first is None:
            first = found
            click.echo(f"{found['reader']}: {sum(map(len, found['greedy']))} greedy tokens behind {len(TEXTS)} texts")
            continue
        off = differences(first, found)
        wrong |= bool(off["ids"] or off["greedy"] or off.get("logps", 0.0) > tolerance)
        logps = f", log-probs differ by at most {off['logps']:.1e} nats" if "logps" in off else ""
        click.echo(f"{found['reader']}: ids of {off['ids']} texts and greedy tokens of {off['greedy']} differ{logps}")
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
