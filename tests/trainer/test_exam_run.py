"""Generation, evaluation and pair building with tiny models whose every next token is known."""

import json
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from medtrain.trainer.errors import InputError
from medtrain.trainer.exam import evaluate as evaluation
from medtrain.trainer.exam.evaluate import answer_exam, evaluate, model_digest, run_eval, summarize_rows
from medtrain.trainer.exam.generate import HFEngine, Output, load_engine
from medtrain.trainer.exam.pairs import ReasoningPath, build_pairs, run_pairs, sample_paths
from medtrain.trainer.exam.prompts import PromptStyle, Stop
from medtrain.trainer.exam.questions import Question

# Each character is a token, and the model is a Markov chain over them: after "説明：" it explains and answers b or c.
STYLE = PromptStyle(explain_marker="説明：", joint="。", instruction_answer="", instruction_explain="")
CHAIN = {
    "：": "理",
    "理": "由",
    "由": "。",
    "。": "答",
    "答": "え",
    "え": ":",
    ":": " ",
    " ": "b",
    "b": "\n",
    "c": "\n",
}
CHAIN |= {"\n": "問", "問": "題", "題": "<eos>"}
TEXT = "abcde.,。：:説明答え問題理由薬はどれか赤青白黄\n 12345xyz"
QUESTIONS = [
    Question("1", "薬はどれか。", ("赤", "青", "白"), ("b",), explanation="青は薬。", points=1),
    Question("2", "薬は薬はどれか。", ("赤", "青", "白"), ("c",), explanation="白は薬。", points=3, kinki=("b",)),
    Question("3", "薬は薬は薬はどれか。", ("赤", "青", "白"), ("a", "c"), points=1),
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer():
    characters = ["<eos>", "<unk>", *dict.fromkeys(TEXT)]
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")


def chain_model(tokenizer, chain, either=None):
    """A Qwen2 whose layers add nothing, so that head x embedding is the table of next tokens; ``either`` follows evenly."""
    size = len(tokenizer)
    config = Qwen2Config(
        vocab_size=size,
        hidden_size=64,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, 64))
        model.lm_head.weight.zero_()
        for token, following in chain.items():
            for one in (following,) if token != either else (following, chr(ord(following) + 1)):
                model.lm_head.weight[tokenizer.convert_tokens_to_ids(one), tokenizer.convert_tokens_to_ids(token)] = 3.0
    return model.eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return chain_model(tokenizer, CHAIN)


@pytest.fixture(scope="module")
def unsure_model(tokenizer):
    return chain_model(tokenizer, CHAIN, either=" ")


@pytest.fixture
def checkpoint(tmp_path, model, tokenizer):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def exam(tmp_path):
    path = tmp_path / "exam.jsonl"
    rows = [
        {
            "problem_id": q.problem_id,
            "problem_text": q.problem_text,
            "choices": list(q.choices),
            "text_only": True,
            "answer": list(q.answer),
            "points": q.points,
            "kinki": list(q.kinki),
            "explanation": q.explanation,
        }
        for q in QUESTIONS
    ]
    rows.append(rows[0] | {"problem_id": "4", "text_only": False})
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


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
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
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


def test_evaluate_writes_the_result_and_every_output(checkpoint, exam, tmp_path):
    seen = []
    result = evaluate(
        checkpoint, exam, out=tmp_path / "out", style=STYLE, max_new_tokens=40, progress=lambda *a: seen.append(a)
    )
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


# Pairs


def paths(*outputs, prompt="P"):
    return [ReasoningPath(prompt, output) for output in outputs]


RIGHT = [f" 理由{i}。答え: b" for i in range(3)]
WRONG = [f" 理由{i}。答え: c" for i in range(4)]


def test_the_ground_truth_is_preferred_over_each_wrong_path():
    rows, summary = build_pairs(QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="explanation", style=STYLE)
    assert {row["chosen"] for row in rows} == {" 青は薬。。答え: b"}
    assert sorted(row["rejected"] for row in rows) == WRONG
    assert all((row["prompt"], row["question_id"], row["strategy"]) == ("P", "1", "explanation") for row in rows)
    assert summary["pairs"] == {"explanation": 4} and summary["paths"]["right"] == 3


def test_right_paths_are_preferred_over_wrong_ones_and_none_is_used_twice_too_early():
    rows, _ = build_pairs(
        QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="sampled", max_per_question=3, style=STYLE
    )
    assert len({row["chosen"] for row in rows}) == len({row["rejected"] for row in rows}) == 3
    rows, summary = build_pairs(
        QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="sampled", max_per_question=99, style=STYLE
    )
    pairs = [(row["chosen"], row["rejected"]) for row in rows]
    assert len(set(pairs)) == len(pairs) == 12 and summary["left_out_by_cap"] == 0
    assert {c for c, _ in pairs} == set(RIGHT) and {r for _, r in pairs} == set(WRONG)


def test_both_strategies_share_the_cap():
    for cap, kinds in ((4, (2, 2)), (5, (3, 2)), (1, (1, 0)), (99, (4, 12))):
        rows, summary = build_pairs(
            QUESTIONS[:1], {"1": paths(*RIGHT, *WRONG)}, strategy="both", max_per_question=cap, style=STYLE
        )
        made = [row["strategy"] for row in rows]
        assert (made.count("explanation"), made.count("sampled")) == kinds
        assert summary["left_out_by_cap"] == 16 - len(rows)
    rows, _ = build_pairs(QUESTIONS[:1], {"1": paths(*WRONG)}, strategy="both", max_per_question=4, style=STYLE)
    assert [row["strategy"] for row in rows] == ["explanation"] * 4


def test_pairs_follow_the_seed_and_the_question_alone():
    both = {"1": paths(*RIGHT, *WRONG), "2": paths(*RIGHT, *WRONG)}
    settings = {"strategy": "sampled", "max_per_question": 2, "style": STYLE}
    runs = [build_pairs(QUESTIONS[:2], both, seed=seed, **settings)[0] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    truths = [build_pairs(QUESTIONS[:1], both, seed=s, **settings | {"strategy": "explanation"})[0] for s in range(9)]
    assert len({row["rejected"] for rows in truths for row in rows}) == len(WRONG)
    alone, _ = build_pairs(QUESTIONS[1:2], both, seed=1, **settings)
    assert alone == [row for row in runs[0] if row["question_id"] == "2"]


def test_repeated_cut_off_and_unreadable_paths_make_no_pairs():
    given = paths(WRONG[0], WRONG[0], WRONG[0] + "\n ", " わからない") + [ReasoningPath("P", WRONG[1], truncated=True)]
    rows, summary = build_pairs(QUESTIONS[:1], {"1": given}, strategy="both", style=STYLE)
    assert [row["rejected"] for row in rows] == [WRONG[0]]
    assert summary["paths"] == {"right": 0, "wrong": 1, "unparsed": 1, "truncated": 1, "duplicate": 2}


def test_an_answer_that_is_no_choice_is_wrong_only_where_that_is_asked_for_and_certain():
    style = replace(STYLE, answer_as="text")
    certain = [" 理由。答え: 黄", " 理由。答え: 問題薬"]
    unclear = [
        " 黄",  # no answer line
        " 理由。答え:",
        " 答え: 黄。答え: 黒",  # two answer lines
        " 答え: 黄\nわからない",  # something after it
        " 答え: 黄と白",  # a choice among others
        " 答え: b または c",
    ]
    given = paths(*certain, *unclear, " 理由。答え: 白", " 理由。答え: 青") + [
        ReasoningPath("P", " 答え: 黄", truncated=True)
    ]
    settings = {"strategy": "explanation", "style": style}
    rows, summary = build_pairs(QUESTIONS[:1], {"1": given}, **settings)
    assert [row["rejected"] for row in rows] == [" 理由。答え: 白"] and summary["paths"]["wrong"] == 1
    rows, summary = build_pairs(QUESTIONS[:1], {"1": given}, **settings, unlisted_is_wrong=True)
    assert sorted(row["rejected"] for row in rows) == sorted([*certain, " 理由。答え: 白"])
    assert summary["paths"] == {"right": 1, "wrong": 3, "unparsed": len(unclear), "truncated": 1, "duplicate": 0}
    with pytest.raises(InputError, match="unlisted_is_wrong"):
        build_pairs(QUESTIONS[:1], {"1": given}, style=STYLE, unlisted_is_wrong=True)


def test_the_summary_says_why_questions_gave_no_pairs():
    q = [replace(QUESTIONS[0], problem_id=str(i), explanation=None if i > 2 else "青。") for i in range(6)]
    given = {
        "1": paths(*RIGHT),
        "2": paths(" わからない"),
        "3": paths(*WRONG),
        "4": paths(*RIGHT, *WRONG),
        "5": paths(*WRONG),
    }
    _, summary = build_pairs(q, given, strategy="both", style=STYLE)
    assert summary["without_pairs"] == {
        "no paths": 1,
        "no wrong path": 1,
        "no path with a readable answer": 1,
        "no right path and no explanation": 2,
    }
    assert (summary["questions"], summary["questions_with_pairs"]) == (6, 1)
    assert build_pairs(q[3:4], given, strategy="explanation", style=STYLE)[1]["without_pairs"] == {"no explanation": 1}
    assert build_pairs(q[3:4], given, strategy="sampled", style=STYLE)[1]["without_pairs"] == {"no right path": 1}


def test_wrong_requests_for_pairs_are_refused(model, tokenizer):
    with pytest.raises(InputError, match="field 'strategy': unknown"):
        build_pairs(QUESTIONS, {}, strategy="x")
    with pytest.raises(InputError, match="max_per_question"):
        build_pairs(QUESTIONS, {}, max_per_question=0)
    with pytest.raises(InputError, match="different prompts"):
        build_pairs(QUESTIONS[:1], {"1": [ReasoningPath("P", "a"), ReasoningPath("Q", "b")]})
    with pytest.raises(InputError, match="temperature"):
        sample_paths(HFEngine(model, tokenizer), QUESTIONS, num_paths=2, temperature=0)


def test_pairs_continue_the_prompts_of_the_exam_token_for_token(unsure_model, tokenizer):
    engine = HFEngine(unsure_model, tokenizer)
    sampled = sample_paths(engine, QUESTIONS[:2], num_paths=12, temperature=0.3, seed=3, max_new_tokens=40, style=STYLE)
    rows, summary = build_pairs(QUESTIONS[:2], sampled, strategy="both", style=STYLE)
    assert summary["questions_with_pairs"] == 2 and set(summary["pairs"]) == {"explanation", "sampled"}
    asked = {
        r["problem_id"]: r["prompt"]
        for r in answer_exam(unsure_model, tokenizer, QUESTIONS, "explain", STYLE, max_new_tokens=40)
    }
    for row in rows:
        assert row["prompt"] == asked[row["question_id"]]
        if row["strategy"] == "sampled":
            # Trained as the model wrote it: every token of the path is one the model could have written there.
            ids = tokenizer(row["prompt"]).input_ids + tokenizer(row["rejected"]).input_ids
            with torch.no_grad():
                logits = unsure_model(torch.tensor([ids])).logits[0]
            start = len(tokenizer(row["prompt"]).input_ids)
            assert all(logits[i - 1, ids[i]] >= logits[i - 1].max() - 1e-3 for i in range(start, len(ids)))


def test_run_pairs_writes_the_file_and_counts_image_questions(tmp_path, exam, unsure_model, tokenizer):
    unsure_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "new/pairs.jsonl"
    settings = {"num_paths": 8, "temperature": 0.3, "max_new_tokens": 40, "style": STYLE}
    summary = run_pairs(tmp_path / "model", exam, out, **settings)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(summary["pairs"].values()) == len(rows) > 0 and summary["skipped_image_questions"] == 1
    with pytest.raises(InputError, match="no pair came about"):
        run_pairs(tmp_path / "model", exam, tmp_path / "none.jsonl", **settings | {"max_new_tokens": 2})
    assert not (tmp_path / "none.jsonl").exists()
