"""Generation, choice log-probs and evaluation with tiny models whose every next token is known."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from exam_models import CHAIN, QUESTIONS, STYLE, chain_model, generate, write_style
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from medtrain.trainer.config.exam import EvalSettings
from medtrain.trainer.errors import InputError
from medtrain.trainer.exam import choices
from medtrain.trainer.exam import evaluate as evaluation
from medtrain.trainer.exam.choices import candidates, score_choices, summarize_choices
from medtrain.trainer.exam.evaluate import as_text, evaluate, exam_row
from medtrain.trainer.exam.generate import HFEngine, Output, load_engine
from medtrain.trainer.exam.prepare import model_digest
from medtrain.trainer.exam.prompts import Stop
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.scoring import INVALID, summarize


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run(checkpoint, exam, tmp_path):
    """Evaluate the checkpoint on the exam with STYLE, or another style."""

    def run(out="out", style=STYLE, **settings):
        prompt = write_style(tmp_path / "style.yaml", style)
        return evaluate(checkpoint, exam, tmp_path / out, EvalSettings(prompt=prompt, **settings))

    return run


# Generation


def test_outputs_end_at_eos_or_a_stop_or_say_that_they_were_cut(model, tokenizer):
    engine = HFEngine(model, tokenizer)
    assert generate(engine, ["：", "え"], max_new_tokens=40) == [Output("理由。答え: b\n問題", False), Output(": b\n問題", False)]
    (out,) = generate(engine, ["："], max_new_tokens=40, stop=Stop(("\n問",)))
    assert (out.text, out.truncated) == ("理由。答え: b", False)
    (out,) = generate(engine, ["："], max_new_tokens=40, stop=Stop((), "答え:"))
    assert (out.text, out.truncated) == ("理由。答え: b", False)
    assert generate(engine, ["："], max_new_tokens=5)[0] == Output("理由。答え", True)
    assert generate(engine, [], max_new_tokens=5) == []


def test_a_row_that_has_ended_is_not_run_to_the_token_limit(model, tokenizer):
    chain = dict(CHAIN) | {"題": "題"}  # never ends by itself
    endless = chain_model(tokenizer, chain)
    steps = []
    endless.register_forward_hook(lambda *_: steps.append(1))
    (out,) = generate(HFEngine(endless, tokenizer), ["："], max_new_tokens=300, stop=Stop(("\n問題",)))
    assert out.text == "理由。答え: b" and not out.truncated
    assert len(steps) <= 24


def test_what_is_generated_does_not_depend_on_the_batch(tokenizer):
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    random_model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in random_model.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # far from ties
    prompts = ["薬", "薬はどれか", "赤青白黄。12345", "x", "説明答え問題理由" * 3]
    together = generate(HFEngine(random_model, tokenizer), prompts, max_new_tokens=20)
    by_twos = generate(HFEngine(random_model, tokenizer, max_rows=2), prompts, max_new_tokens=20)
    alone = [generate(HFEngine(random_model, tokenizer), [p], max_new_tokens=20)[0] for p in prompts]
    tight = generate(HFEngine(random_model, tokenizer, batch_tokens=1), prompts, max_new_tokens=20)
    assert together == by_twos == alone == tight
    assert len({out.text for out in together}) > 1


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone(unsure_model, tokenizer):
    engine = HFEngine(unsure_model, tokenizer)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runs = [generate(engine, ["："] * 40, max_new_tokens=40, temperature=0.3, seed=s) for s in (1, 1, 2)]
    assert torch.equal(torch.rand(3), expected)
    assert runs[0] == runs[1] != runs[2]
    answers = [out.text[7:8] for out in runs[0]]
    assert 8 < answers.count("b") < 32 and set(answers) == {"b", "c"}


def test_settings_of_the_checkpoint_do_not_leak_into_an_exam(model, tokenizer):
    before = model.generation_config
    model.generation_config = type(before)(
        do_sample=True, temperature=5.0, max_length=3, suppress_tokens=[tokenizer.convert_tokens_to_ids("b")]
    )
    try:
        out = generate(HFEngine(model, tokenizer), ["："], max_new_tokens=40)[0]
    finally:
        model.generation_config = before
    assert out.text == "理由。答え: b\n問題"


def test_logps_are_those_of_a_plain_forward_pass(unsure_model, tokenizer):
    engine = HFEngine(unsure_model, tokenizer)
    prompts, completions = ["：", "薬はどれか：", "え:", "え:"], ["理由", "理", " b\n", " c"]
    for prompt, completion, logp in zip(prompts, completions, engine.logps(prompts, completions), strict=True):
        ids = tokenizer(prompt).input_ids
        both = ids + tokenizer(completion).input_ids
        with torch.no_grad():
            table = unsure_model(torch.tensor([both])).logits[0].log_softmax(-1)
        expected = sum(float(table[i - 1, both[i]]) for i in range(len(ids), len(both)))
        assert logp == pytest.approx(expected, abs=1e-4)


def test_what_cannot_be_generated_is_said_before_anything_is(model, tokenizer):
    engine = HFEngine(model, tokenizer)
    with pytest.raises(InputError, match="do not fit the model .*601 tokens; expected at most 512"):
        engine.logps(["x", "x" * 600], ["a", "b"])
    with pytest.raises(InputError, match="without tokens"):
        engine.logps([""], ["a"])
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="nothing could end an output"):
        generate(HFEngine(model, without_eos), ["x"], max_new_tokens=5)
    (out,) = generate(HFEngine(model, without_eos), ["："], max_new_tokens=20, stop=Stop(("\n",)))
    assert out.text == "理由。答え: b"


def test_engines_that_cannot_work_are_refused(checkpoint):
    with pytest.raises(InputError, match="field 'dtype': unknown"):
        load_engine(checkpoint, EvalSettings(dtype="float3"))
    (checkpoint / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_engine(checkpoint, EvalSettings())


def test_vllm_missing_is_a_users_mistake(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm is not installed"):
        load_engine(checkpoint, EvalSettings(engine="vllm"))


def test_vllm_gets_token_ids_and_its_texts_are_cut_alike(checkpoint, tokenizer, monkeypatch):
    calls = []

    class LLM:
        def __init__(self, **settings):
            assert settings["model"] == str(checkpoint)

        def get_tokenizer(self):
            return tokenizer

        def generate(self, prompts, settings):
            calls.append((prompts, settings))
            texts = [("理由。答え: b\n続き", "length"), ("理由", "length")]
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=t, finish_reason=r, token_ids=[1, 2])])
                for t, r in texts[: len(prompts)]
            ]

    fake = ModuleType("vllm")
    fake.LLM, fake.SamplingParams = LLM, lambda **settings: settings
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = load_engine(checkpoint, EvalSettings(engine="vllm"))
    outputs = generate(engine, ["x", "xy"], max_new_tokens=9, stop=Stop(("zz",), "答え:"), seed=4)
    assert outputs == [Output("理由。答え: b", False), Output("理由", True)]
    (prompts, settings) = calls[0]
    assert prompts[1] == {"prompt_token_ids": tokenizer("xy").input_ids}
    assert settings[1] == {"temperature": 0.0, "max_tokens": 9, "stop": ["zz"], "seed": 5}


# Evaluation


def answer(model, tokenizer, mode, max_new_tokens=40):
    prompts = [STYLE.prompt(question, mode, tokenizer) for question in QUESTIONS]
    outputs = generate(HFEngine(model, tokenizer), prompts, max_new_tokens=max_new_tokens, stop=STYLE.stop(mode))
    return [exam_row(STYLE, mode, *of_one) for of_one in zip(QUESTIONS, prompts, outputs, strict=True)]


def test_a_model_in_memory_answers_in_both_modes(model, tokenizer):
    for mode in ("answer", "explain"):
        rows = answer(model, tokenizer, mode)
        assert [(r["parsed"], r["correct"]) for r in rows] == [(["b"], True), (["b"], False), (["b"], False)]
        result = summarize(QUESTIONS, rows)
        assert (result["points"], result["max_points"], result["forbidden_choices"]) == (1, 5, 1)
        assert result["parse_failures"] == 0 and not any(row["truncated"] for row in rows)
    rows = answer(model, tokenizer, "explain", max_new_tokens=5)
    result = summarize(QUESTIONS, rows)
    assert all(row["truncated"] for row in rows)
    assert (result["parse_failures"], result["correct"]) == (3, 0)


def test_the_most_likely_answer_has_as_many_letters_as_the_exam_asks_for(tokenizer):
    sure_of_c = chain_model(tokenizer, CHAIN | {" ": "c", "a": ",", ",": "c"})
    number = Question("n", "量を求めよ。", (), ("5",))
    questions = [QUESTIONS[1], replace(QUESTIONS[2], problem_text="薬はどれか。2つ選べ。"), number]
    prompts = [STYLE.prompt(question, "answer", tokenizer) for question in questions]
    ((_, outputs),) = score_choices(HFEngine(sure_of_c, tokenizer), questions, prompts, STYLE)
    assert [output.text for output in outputs] == [" c", " a,c", ""]
    rows = [exam_row(STYLE, "answer", *of_one) for of_one in zip(questions, prompts, outputs, strict=True)]
    assert [row["correct"] for row in rows] == [True, True, False] and rows[2]["failure"]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("どれか。", 3),
        ("どれか。2つ選べ。", 3),
        ("３つ選べ", 1),
        ("二つを選べ", 3),
        ("Select TWO answers", 3),
        ("2つの所見がある。どれか。", 3),
        ("すべて選べ。", 0),
        ("Select all that apply.", 0),
    ],
)
def test_candidates_are_what_the_exams_text_asks_for(text, count):
    found = candidates(replace(QUESTIONS[0], problem_text=text))
    assert len(found) == count
    if found:
        assert {len(one) for one in found} == {3 if count == 1 else 2 if "つ選" in text or "二" in text or "TWO" in text else 1}


def test_acc_takes_the_sum_and_acc_norm_the_sum_per_character():
    style = replace(STYLE, answer_as="text")
    question = Question("1", "どれか。", ("長い長い薬", "薬"), ("a",))
    tables = [{"a": -3.0, "b": -1.0}, {"a": -9.0, "b": -1.0}]
    assert summarize_choices([question] * 2, tables, style) == {"acc": 0.0, "acc_norm": 0.5}
    assert summarize_choices([question] * 2, tables, STYLE) == {"acc": 0.0, "acc_norm": 0.0}  # letters: all one long
    assert summarize_choices([question], [{}], style) == {"acc": 0.0, "acc_norm": 0.0}


def killer(lines):
    """Kills the run when it logs one of ``lines``."""

    def kill(line):
        if line in lines:
            raise KeyboardInterrupt

    return kill


def test_choice_logps_are_written_and_a_killed_run_keeps_them(run, tmp_path, monkeypatch, log):
    monkeypatch.setattr(choices, "_PORTION", 1)
    log.on_line = killer(["answer: 2/3"])
    with pytest.raises(KeyboardInterrupt):
        run(mode="answer", method="choice_logp")
    log.on_line = killer([])
    result = run(mode="answer", method="choice_logp")["answer"]
    assert log.lines[2:] == ["answer: 2/3", "answer: 2/3", "answer: 3/3"]
    assert (result["correct"], result["acc"], result["acc_norm"], result["truncated"]) == (1, 1 / 3, 1 / 3, 0)
    rows = [json.loads(line) for line in (tmp_path / "out/outputs-answer.jsonl").read_text().splitlines()]
    assert [set(row["choice_logps"]) for row in rows] == [{"a", "b", "c"}] * 3
    assert all(max(row["choice_logps"].values()) == row["choice_logps"]["b"] <= 0 for row in rows)


def test_logps_do_not_depend_on_how_many_rows_fit(unsure_model, tokenizer):
    prompts, completions = ["：", "薬はどれか：", "え:", "x"], ["理由。", "理", " b\n", " c"]
    together = HFEngine(unsure_model, tokenizer).logps(prompts, completions)
    assert HFEngine(unsure_model, tokenizer, max_rows=1).logps(prompts, completions) == pytest.approx(together, abs=1e-5)


def test_the_gap_has_an_interval_and_a_p_value(checkpoint, run, tokenizer):
    # "説明：" leads to b as ever; the answer alone is c.
    chain_model(tokenizer, CHAIN | {" ": "c", "。": "b"}).save_pretrained(checkpoint)
    result = run(max_new_tokens=40)
    points = {mode: result[mode]["points"] for mode in ("answer", "explain")}
    assert result["explanation_gap"] == pytest.approx((points["answer"] - points["explain"]) / 5)
    assert result["explanation_gap_low"] <= result["explanation_gap"] <= result["explanation_gap_high"]
    assert 0 < result["explanation_gap_p_value"] <= 1
    assert result["answer"]["points_ratio_low"] <= result["answer"]["points_ratio"]


def test_evaluate_writes_the_result_and_every_output(run, tmp_path, log):
    result = run(max_new_tokens=40)
    assert result == json.loads((tmp_path / "out/exam.json").read_text())
    for mode in ("answer", "explain"):
        figures = {k: result[mode][k] for k in ("points", "max_points", "correct", "questions", "truncated")}
        assert figures == {"points": 1, "max_points": 5, "correct": 1, "questions": 3, "truncated": 0}
        rows = [json.loads(line) for line in (tmp_path / f"out/outputs-{mode}.jsonl").read_text().splitlines()]
        assert [row["problem_id"] for row in rows] == ["1", "2", "3"]
        assert set(rows[0]) >= {"prompt", "output", "parsed", "correct", "read_from", "truncated"}
    assert result["explanation_gap"] == 0.0
    assert (result["questions_in_exam"], result["skipped_image_questions"]) == (4, 1)
    assert log.lines[0] == "answer: 0/3" and log.lines[-1] == "explain: 3/3"
    assert not list((tmp_path / "out").glob("*part*"))


def test_a_run_that_was_killed_goes_on_from_its_last_whole_row(run, tmp_path, monkeypatch):
    out, settings = tmp_path / "out", {"mode": "explain", "max_new_tokens": 40}
    whole = run("whole", **settings)
    run(**settings)
    lines = (out / "outputs-explain.jsonl").read_bytes().split(b"\n")
    (out / "outputs-explain.partial.jsonl").write_bytes(lines[0] + b"\n" + lines[1][:30])
    (out / "outputs-explain.jsonl").unlink()
    (out / "exam.json").unlink()
    numbers = []
    batches = HFEngine.batches
    monkeypatch.setattr(HFEngine, "batches", lambda self, p, *a, **k: numbers.append(len(p)) or batches(self, p, *a, **k))
    assert run(**settings) == whole
    assert numbers == [2]
    assert (out / "outputs-explain.jsonl").read_bytes().split(b"\n") == lines
    monkeypatch.setattr(evaluation, "load_engine", lambda *a, **k: pytest.fail("nothing is left to generate"))
    assert run(**settings) == whole


def test_a_run_killed_twice_keeps_the_rows_of_both_times(run, tmp_path, log):
    settings = {"mode": "explain", "max_new_tokens": 40, "batch_tokens": 1}
    log.on_line = killer(["explain: 1/3"])
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    partial = tmp_path / "out" / "outputs-explain.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1
    with open(partial, "a") as file:
        file.write('{"problem_id": "cut off he')
    log.on_line = killer(["explain: 2/3"])
    with pytest.raises(KeyboardInterrupt):
        run(**settings)
    log.on_line, before = killer([]), len(log.lines)
    result = run(**settings)
    assert log.lines[before] == "explain: 2/3" and result["explain"]["questions"] == 3


def test_modes_may_be_run_one_after_the_other(run):
    assert run(mode="answer", max_new_tokens=40)["explanation_gap"] is None
    assert run(mode="explain", max_new_tokens=40)["explanation_gap"] == 0.0


def test_a_limit_belongs_to_the_outputs_of_its_mode(run):
    run(mode="answer", max_new_tokens=9)
    assert run(mode="explain", max_new_tokens=40)["settings"]["max_new_tokens"] == 40
    with pytest.raises(InputError, match="a run with another max_new_tokens"):
        run(max_new_tokens=41)
    assert run(mode="answer")["settings"]["max_new_tokens"] == 40
    with pytest.raises(InputError, match="a run with another max_answer_tokens"):
        run(mode="answer", max_answer_tokens=5)


def test_outputs_that_do_not_fit_are_told_before_any_mode_runs(run, tmp_path):
    with pytest.raises(InputError, match=r"field 'max_new_tokens': leaves no room for a prompt \(found 600; expected below 512"):
        run(max_new_tokens=600)
    with pytest.raises(InputError, match=r"exam\.jsonl: the prompt does not fit .*question 1, explain: .* 490 new ones"):
        run(max_new_tokens=490)
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_refused(run, tmp_path, checkpoint, tokenizer):
    settings = {"mode": "answer", "max_new_tokens": 40}
    run(**settings)
    before = (tmp_path / "out/exam.json").read_bytes()
    with pytest.raises(InputError, match="a run with another limit"):
        run(limit=1, **settings)
    with pytest.raises(InputError, match="a run with another style"):
        run(style=replace(STYLE, lead=""), **settings)
    chain_model(tokenizer, CHAIN | {" ": "c"}).save_pretrained(checkpoint)
    with pytest.raises(InputError, match="a run with another model"):
        run(**settings)
    assert (tmp_path / "out/exam.json").read_bytes() == before
    (tmp_path / "out/run.json").unlink()
    with pytest.raises(InputError, match="holds results, and no record of how they were made"):
        run(**settings)


def test_a_run_that_failed_before_its_first_output_leaves_the_folder_free(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm"):
        run(mode="answer", engine="vllm")
    assert run(mode="answer", max_new_tokens=40)["answer"]["correct"] == 1


def test_wrong_requests_are_refused_before_the_model_loads(checkpoint, exam, run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_engine", lambda *a, **k: pytest.fail("loaded"))
    for wrong in ({"method": "choice_logp"}, {"demonstrations": str(exam)}):
        with pytest.raises(InputError):
            run(max_new_tokens=40, **wrong)
    with pytest.raises(InputError, match="cannot be read"):
        evaluate(checkpoint, tmp_path / "none.jsonl", tmp_path / "out", EvalSettings())
    with pytest.raises(InputError, match="no checkpoint"):
        evaluate(tmp_path / "none", exam, tmp_path / "out", EvalSettings())
    assert not (tmp_path / "out").exists()


def refused(run, words, tmp_path):
    with pytest.raises(InputError, match=words) as caught:
        run(max_new_tokens=40)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_model_that_training_refuses_is_refused_before_the_folder_is_made(run, tmp_path, checkpoint, model, tokenizer):
    weights = checkpoint / "model.safetensors"
    other = checkpoint / "model-00001-of-00001.safetensors"
    (checkpoint / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    refused(run, "model.safetensors: damaged or changed .*SHA256SUMS", tmp_path)
    (checkpoint / "SHA256SUMS").unlink()
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"vocab_size": 9}))
    refused(run, "the tokenizer does not fit the weights", tmp_path)
    (checkpoint / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    refused(run, "another head than the embedding", tmp_path)
    (checkpoint / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3, "layer_types": None}))
    refused(run, "missing tensor", tmp_path)
    (checkpoint / "config.json").write_text(json.dumps(config))
    other.write_bytes(weights.read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), other.name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run, "two sets of weights", tmp_path)
    weights.unlink()
    assert run(max_new_tokens=40)["answer"]["questions"] == 3


def test_a_run_folder_and_an_adapter_are_told_for_what_they_are(run, tmp_path, checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    refused(run, "an adapter, not a model .expected the model merged with it: RUN/model", tmp_path)
    (checkpoint / "adapter_config.json").rename(checkpoint / "manifest.json")
    (checkpoint / "config.json").unlink()
    refused(run, f"a run folder, not a model .expected {checkpoint}/model", tmp_path)


def test_the_digest_sees_one_changed_weight_and_not_the_date(checkpoint, model, tokenizer):
    before = model_digest(checkpoint)
    model.save_pretrained(checkpoint)
    assert model_digest(checkpoint) == before
    changed = chain_model(tokenizer, CHAIN)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight.copy_(model.model.layers[1].mlp.up_proj.weight)
    changed.load_state_dict(model.state_dict())
    with torch.no_grad():
        changed.model.norm.weight[-1] += 1e-3
    changed.save_pretrained(checkpoint)
    assert model_digest(checkpoint) != before


@pytest.mark.parametrize("place", [0, 75_000, 149_999])
def test_the_digest_samples_the_beginning_middle_and_end_of_a_large_tensor(tmp_path, place):
    (tmp_path / "config.json").write_text("{}")
    weight = torch.zeros(150_000)
    save_file({"w": weight}, tmp_path / "model.safetensors")
    before = model_digest(tmp_path)
    weight[place] = 1
    save_file({"w": weight}, tmp_path / "model.safetensors")
    assert model_digest(tmp_path) != before


def test_image_questions_are_included_only_on_request(run, log):
    result = run(mode="answer", images=True, max_new_tokens=40)
    assert (result["answer"]["questions"], result["skipped_image_questions"]) == (4, 0)
    assert log.lines[-1] == "answer: 4/4"


def test_figures_of_a_kv_cache_that_does_not_agree_stay_invalid(run, monkeypatch):
    monkeypatch.setattr(HFEngine, "cache_agrees", lambda *_: False)
    assert run(mode="answer", max_new_tokens=40)["invalid"] == INVALID
    monkeypatch.undo()
    result = run(mode="explain", max_new_tokens=40)  # next to answers that were made wrongly
    assert result["invalid"] == INVALID and f"these figures are invalid: {INVALID}" in as_text(result)
    assert "invalid" not in run("other", max_new_tokens=40)


def test_outputs_of_which_most_were_unread_or_cut_off_are_told(run):
    result = run(max_new_tokens=2)
    (note,) = (line for line in as_text(result).splitlines() if line.startswith("note:"))
    assert note.startswith("note: explain: no answer was read in 3 of 3 outputs, 3 were cut off")
    assert "outputs-explain.jsonl" in note


def test_a_long_batch_logs_how_many_outputs_have_ended(model, tokenizer, monkeypatch, log):
    monkeypatch.setattr("medtrain.trainer.exam.generate._SECONDS_BETWEEN_LINES", 0.0)
    generate(HFEngine(model, tokenizer), ["え", "："], max_new_tokens=40)
    assert log.lines[0] == "1 of 2 outputs of this batch have ended, after 8 tokens"
