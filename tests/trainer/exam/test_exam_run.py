"""Generation, choice log-probs and evaluation with tiny models whose every next token is known."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from exam_models import CHAIN, QUESTIONS, STYLE, chain_model
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from medtrain.trainer.errors import InputError
from medtrain.trainer.exam import evaluate as evaluation
from medtrain.trainer.exam.choices import candidates, summarize_choices
from medtrain.trainer.exam.evaluate import answer_exam, as_text, evaluate, model_digest, run_eval, summarize_rows
from medtrain.trainer.exam.generate import HFEngine, Output, load_engine
from medtrain.trainer.exam.prompts import Stop
from medtrain.trainer.exam.questions import Question
from medtrain.trainer.exam.scoring import INVALID


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Generation


def test_outputs_end_at_eos_or_a_stop_or_say_that_they_were_cut(model, tokenizer):
    engine = HFEngine(model, tokenizer)
    assert engine.generate(["：", "え"], max_new_tokens=40) == [
        Output("理由。答え: b\n問題", False, 12),
        Output(": b\n問題", False, 7),
    ]
    (out,) = engine.generate(["："], max_new_tokens=40, stop=Stop(("\n問",)))
    assert (out.text, out.truncated) == ("理由。答え: b", False)
    (out,) = engine.generate(["："], max_new_tokens=40, stop=Stop((), "答え:"))
    assert (out.text, out.truncated) == ("理由。答え: b", False)
    assert engine.generate(["："], max_new_tokens=5)[0] == Output("理由。答え", True, 5)
    assert engine.generate([], max_new_tokens=5) == []


def test_a_row_that_has_ended_is_not_run_to_the_token_limit(model, tokenizer):
    chain = dict(CHAIN) | {"題": "題"}  # never ends by itself
    endless = chain_model(tokenizer, chain)
    steps = []
    endless.register_forward_hook(lambda *_: steps.append(1))
    (out,) = HFEngine(endless, tokenizer).generate(["："], max_new_tokens=300, stop=Stop(("\n問題",)))
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
    together = HFEngine(random_model, tokenizer).generate(prompts, max_new_tokens=20)
    by_twos = HFEngine(random_model, tokenizer, max_rows=2).generate(prompts, max_new_tokens=20)
    alone = [HFEngine(random_model, tokenizer).generate([p], max_new_tokens=20)[0] for p in prompts]
    tight = HFEngine(random_model, tokenizer, batch_tokens=1).generate(prompts, max_new_tokens=20)
    assert together == by_twos == alone == tight
    assert len({out.text for out in together}) > 1


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone(unsure_model, tokenizer):
    engine = HFEngine(unsure_model, tokenizer)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    runs = [engine.generate(["："] * 40, max_new_tokens=40, temperature=0.3, seed=s) for s in (1, 1, 2)]
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
        out = HFEngine(model, tokenizer).generate(["："], max_new_tokens=40)[0]
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
    with pytest.raises(InputError, match="prompt 2 is too long for the model .*600 prompt tokens"):
        engine.generate(["x", "x" * 600], max_new_tokens=5)
    with pytest.raises(InputError, match="prompt 1 is empty"):
        engine.generate([""], max_new_tokens=5)
    with pytest.raises(InputError, match="max_new_tokens"):
        engine.generate(["x"], max_new_tokens=0)
    without_eos = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="nothing could end an output"):
        HFEngine(model, without_eos).generate(["x"], max_new_tokens=5)
    (out,) = HFEngine(model, without_eos).generate(["："], max_new_tokens=20, stop=Stop(("\n",)))
    assert out.text == "理由。答え: b"


def test_engines_that_cannot_work_are_refused(tmp_path, checkpoint):
    with pytest.raises(InputError, match="no checkpoint"):
        load_engine(tmp_path)
    with pytest.raises(InputError, match="field 'engine': unknown"):
        load_engine(checkpoint, "tgi")
    with pytest.raises(InputError, match="field 'dtype': unknown"):
        load_engine(checkpoint, dtype="float3")
    (checkpoint / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_engine(checkpoint)


def test_vllm_missing_is_a_users_mistake(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(InputError, match="vllm is not installed"):
        load_engine(checkpoint, "vllm")


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
    engine = load_engine(checkpoint, "vllm")
    outputs = engine.generate(["x", "xy"], max_new_tokens=9, stop=Stop(("zz",), "答え:"), seed=4)
    assert outputs == [Output("理由。答え: b", False, 2), Output("理由", True, 2)]
    (prompts, settings) = calls[0]
    assert prompts[1] == {"prompt_token_ids": tokenizer("xy").input_ids}
    assert settings[1] == {"temperature": 0.0, "max_tokens": 9, "stop": ["zz"], "seed": 5}


# Evaluation


def test_a_model_in_memory_sits_both_modes(model, tokenizer):
    for mode in ("answer", "explain"):
        rows = answer_exam(model, tokenizer, QUESTIONS, mode, STYLE, max_new_tokens=40)
        assert [(r["parsed"], r["correct"]) for r in rows] == [(["b"], True), (["b"], False), (["b"], False)]
        result = summarize_rows(QUESTIONS, rows, mode, STYLE)
        assert (result["points"], result["max_points"], result["forbidden_choices"]) == (1, 5, 1)
        assert (result["truncated"], result["parse_failures"]) == (0, 0)
    rows = answer_exam(model, tokenizer, QUESTIONS, "explain", STYLE, max_new_tokens=5)
    result = summarize_rows(QUESTIONS, rows, "explain", STYLE)
    assert (result["truncated"], result["parse_failures"], result["correct"]) == (3, 3, 0)


def test_the_most_likely_answer_has_as_many_letters_as_the_exam_asks_for(tokenizer):
    sure_of_c = chain_model(tokenizer, CHAIN | {" ": "c", "a": ",", ",": "c"})
    questions = [QUESTIONS[1], replace(QUESTIONS[2], problem_text="薬はどれか。2つ選べ。")]
    rows = answer_exam(sure_of_c, tokenizer, questions, "answer", STYLE, method="choice_logp")
    assert [row["output"] for row in rows] == [" c", " a,c"]
    assert all(row["correct"] for row in rows)
    number = Question("n", "量を求めよ。", (), ("5",))
    assert answer_exam(sure_of_c, tokenizer, [number], "answer", STYLE, method="choice_logp")[0]["failure"]
    with pytest.raises(InputError, match="choice_logp"):
        answer_exam(sure_of_c, tokenizer, questions, "explain", STYLE, method="choice_logp")


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


def test_choice_logps_are_written_and_a_killed_run_keeps_them(checkpoint, exam, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "_CHOICE_PORTION", 1)
    settings = {"out": tmp_path / "out", "mode": "answer", "method": "choice_logp", "style": STYLE}

    def kill_after_two(mode, done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, exam, progress=kill_after_two, **settings)
    result = evaluate(checkpoint, exam, **settings)["answer"]
    assert (result["correct"], result["acc"], result["acc_norm"], result["truncated"]) == (1, 1 / 3, 1 / 3, 0)
    rows = [json.loads(line) for line in (tmp_path / "out/outputs-answer.jsonl").read_text().splitlines()]
    assert [set(row["choice_logps"]) for row in rows] == [{"a", "b", "c"}] * 3
    assert all(max(row["choice_logps"].values()) == row["choice_logps"]["b"] <= 0 for row in rows)


def test_logps_do_not_depend_on_how_many_rows_fit(unsure_model, tokenizer, monkeypatch):
    from medtrain.trainer.exam import generate

    prompts, completions = ["：", "薬はどれか：", "え:", "x"], ["理由。", "理", " b\n", " c"]
    together = HFEngine(unsure_model, tokenizer).logps(prompts, completions)
    monkeypatch.setattr(generate, "_LOGITS_AT_ONCE", 1)
    assert HFEngine(unsure_model, tokenizer).logps(prompts, completions) == pytest.approx(together, abs=1e-5)


def test_the_gap_has_an_interval_and_a_p_value(checkpoint, exam, tmp_path, model, tokenizer):
    # "説明：" leads to b as ever; the answer alone is c.
    chain_model(tokenizer, CHAIN | {" ": "c", "。": "b"}).save_pretrained(checkpoint)
    result = evaluate(checkpoint, exam, out=tmp_path / "out", style=STYLE, max_new_tokens=40)
    points = {mode: result[mode]["points"] for mode in ("answer", "explain")}
    assert result["explanation_gap"] == pytest.approx((points["answer"] - points["explain"]) / 5)
    assert result["explanation_gap_low"] <= result["explanation_gap"] <= result["explanation_gap_high"]
    assert 0 < result["explanation_gap_p_value"] <= 1
    assert result["answer"]["points_ratio_low"] <= result["answer"]["points_ratio"]


def test_evaluate_writes_the_result_and_every_output(checkpoint, exam, tmp_path):
    seen = []
    result = evaluate(checkpoint, exam, out=tmp_path / "out", style=STYLE, max_new_tokens=40, progress=lambda *a: seen.append(a))
    assert result == json.loads((tmp_path / "out/exam.json").read_text())
    for mode in ("answer", "explain"):
        figures = {k: result[mode][k] for k in ("points", "max_points", "correct", "questions", "truncated")}
        assert figures == {"points": 1, "max_points": 5, "correct": 1, "questions": 3, "truncated": 0}
        rows = [json.loads(line) for line in (tmp_path / f"out/outputs-{mode}.jsonl").read_text().splitlines()]
        assert [row["problem_id"] for row in rows] == ["1", "2", "3"]
        assert set(rows[0]) >= {"prompt", "output", "parsed", "correct", "read_from", "truncated"}
    assert result["explanation_gap"] == 0.0
    assert (result["questions_in_exam"], result["skipped_image_questions"]) == (4, 1)
    assert seen[0] == ("answer", 0, 3) and seen[-1] == ("explain", 3, 3)
    assert not list((tmp_path / "out").glob("*part*"))


def test_a_run_that_was_killed_goes_on_from_its_last_whole_row(checkpoint, exam, tmp_path, monkeypatch):
    out = tmp_path / "out"
    whole = evaluate(checkpoint, exam, out=tmp_path / "whole", mode="explain", style=STYLE, max_new_tokens=40)
    evaluate(checkpoint, exam, out=out, mode="explain", style=STYLE, max_new_tokens=40)
    lines = (out / "outputs-explain.jsonl").read_bytes().split(b"\n")
    (out / "outputs-explain.partial.jsonl").write_bytes(lines[0] + b"\n" + lines[1][:30])
    (out / "outputs-explain.jsonl").unlink()
    (out / "exam.json").unlink()
    asked = []
    generate = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda self, p, **k: asked.append(len(p)) or generate(self, p, **k))
    assert evaluate(checkpoint, exam, out=out, mode="explain", style=STYLE, max_new_tokens=40) == whole
    assert asked == [2]
    assert (out / "outputs-explain.jsonl").read_bytes().split(b"\n") == lines
    monkeypatch.setattr(evaluation, "load_engine", lambda *a, **k: pytest.fail("nothing is left to generate"))
    assert evaluate(checkpoint, exam, out=out, mode="explain", style=STYLE, max_new_tokens=40) == whole


def test_a_run_killed_twice_keeps_the_rows_of_both_times(checkpoint, exam, tmp_path):
    out = tmp_path / "out"
    settings = {"out": out, "mode": "explain", "style": STYLE, "max_new_tokens": 40, "batch_tokens": 1}

    def kill_after(count):
        def progress(mode, done, total):
            if done == count:
                raise KeyboardInterrupt

        return progress

    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, exam, progress=kill_after(1), **settings)
    partial = out / "outputs-explain.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 1
    with open(partial, "a") as file:
        file.write('{"problem_id": "cut off he')
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, exam, progress=kill_after(2), **settings)
    seen = []
    result = evaluate(checkpoint, exam, progress=lambda *a: seen.append(a), **settings)
    assert seen[0] == ("explain", 2, 3) and result["explain"]["questions"] == 3


def test_modes_may_be_run_one_after_the_other(checkpoint, exam, tmp_path):
    settings = {"out": tmp_path / "out", "style": STYLE, "max_new_tokens": 40}
    assert evaluate(checkpoint, exam, mode="answer", **settings)["explanation_gap"] is None
    assert evaluate(checkpoint, exam, mode="explain", **settings)["explanation_gap"] == 0.0


def test_a_limit_belongs_to_the_outputs_of_its_mode(checkpoint, exam, tmp_path):
    settings = {"out": tmp_path / "out", "style": STYLE}
    evaluate(checkpoint, exam, mode="answer", **settings, max_new_tokens=9)
    result = evaluate(checkpoint, exam, mode="explain", **settings, max_new_tokens=40)
    assert result["settings"]["max_new_tokens"] == 40
    with pytest.raises(InputError, match="another run: max_new_tokens differ"):
        evaluate(checkpoint, exam, **settings, max_new_tokens=41)
    assert evaluate(checkpoint, exam, mode="answer", **settings)["settings"]["max_new_tokens"] == 40
    with pytest.raises(InputError, match="another run: max_answer_tokens differ"):
        evaluate(checkpoint, exam, mode="answer", **settings, max_answer_tokens=5)


def test_a_prompt_that_does_not_fit_is_told_before_any_mode_is_sat(checkpoint, exam, tmp_path):
    with pytest.raises(InputError, match=r"exam\.jsonl: the prompt does not fit .*question 1, explain: .* 600 new ones"):
        evaluate(checkpoint, exam, out=tmp_path / "out", style=STYLE, max_new_tokens=600)
    assert not (tmp_path / "out").exists()


def test_another_runs_folder_is_refused(checkpoint, exam, tmp_path, model, tokenizer):
    settings = {"out": tmp_path / "out", "mode": "answer", "style": STYLE, "max_new_tokens": 40}
    evaluate(checkpoint, exam, **settings)
    before = (tmp_path / "out/exam.json").read_bytes()
    with pytest.raises(InputError, match="another run: limit differ"):
        evaluate(checkpoint, exam, limit=1, **settings)
    with pytest.raises(InputError, match="another run: style differ"):
        evaluate(checkpoint, exam, **settings | {"style": replace(STYLE, lead="")})
    chain_model(tokenizer, CHAIN | {" ": "c"}).save_pretrained(checkpoint)
    with pytest.raises(InputError, match="another run: model differ"):
        evaluate(checkpoint, exam, **settings)
    assert (tmp_path / "out/exam.json").read_bytes() == before
    (tmp_path / "out/run.json").unlink()
    with pytest.raises(InputError, match="without run.json"):
        evaluate(checkpoint, exam, **settings)


def test_a_run_that_failed_before_its_first_output_leaves_the_folder_free(checkpoint, exam, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    settings = {"out": tmp_path / "out", "mode": "answer", "style": STYLE}
    with pytest.raises(InputError, match="vllm"):
        evaluate(checkpoint, exam, engine="vllm", **settings)
    assert evaluate(checkpoint, exam, **settings)["answer"]["correct"] == 1


def test_wrong_requests_are_refused_before_the_model_loads(checkpoint, exam, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "load_engine", lambda *a, **k: pytest.fail("loaded"))
    out = tmp_path / "out"
    for wrong in ({"mode": "x"}, {"method": "x"}, {"method": "choice_logp"}, {"limit": 0}, {"demonstrations": exam}):
        with pytest.raises(InputError):
            evaluate(checkpoint, exam, out=out, **wrong)
    with pytest.raises(InputError, match="cannot be read"):
        evaluate(checkpoint, tmp_path / "none.jsonl", out=out)
    with pytest.raises(InputError, match="no checkpoint"):
        evaluate(tmp_path / "none", exam, out=out)
    assert not out.exists()


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


def test_run_eval_asks_image_questions_only_when_told_to(checkpoint, exam, tmp_path):
    said = []
    result = run_eval(checkpoint, exam, tmp_path / "a", "answer", images=True, echo=said.append)
    assert (result["answer"]["questions"], result["skipped_image_questions"]) == (4, 0)
    assert said[-1] == "answer: 4/4"


def test_figures_of_a_kv_cache_that_does_not_agree_stay_invalid(checkpoint, exam, tmp_path, monkeypatch):
    settings = {"out": tmp_path / "out", "style": STYLE, "max_new_tokens": 40}
    monkeypatch.setattr(HFEngine, "cache_agrees", lambda *_: False)
    assert evaluate(checkpoint, exam, mode="answer", **settings)["invalid"] == INVALID
    monkeypatch.undo()
    result = evaluate(checkpoint, exam, mode="explain", **settings)  # beside answers that were made wrongly
    assert result["invalid"] == INVALID and f"these figures are invalid: {INVALID}" in as_text(result)
    assert "invalid" not in evaluate(checkpoint, exam, **(settings | {"out": tmp_path / "other"}))


def test_outputs_of_which_most_were_unread_or_cut_off_are_told(checkpoint, exam, tmp_path):
    result = evaluate(checkpoint, exam, out=tmp_path / "out", style=STYLE, max_new_tokens=2)
    (note,) = (line for line in as_text(result).splitlines() if line.startswith("note:"))
    assert note.startswith("note: explain: no answer was read in 3 of 3 outputs, 3 were cut off")
    assert "outputs-explain.jsonl" in note
