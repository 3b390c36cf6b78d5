"""Tiny models whose every next token is known, and questions for them."""

import json
from dataclasses import asdict

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from medtrain.trainer.exam.prompts import PromptStyle, Stop
from medtrain.trainer.exam.questions import Question

# Each character is a token, and the model is a Markov chain over them: after "説明：" it explains and answers b or c.
STYLE = PromptStyle(explain_marker="説明：", joint="。", instruction_answer="", instruction_explain="")
CHAIN = {"：": "理", "理": "由", "由": "。", "。": "答", "答": "え", "え": ":", ":": " ", " ": "b", "b": "\n", "c": "\n"}
CHAIN |= {"\n": "問", "問": "題", "題": "<eos>"}
TEXT = "abcde.,。：:説明答え問題理由薬はどれか赤青白黄\n 12345xyz"
QUESTIONS = [
    Question("1", "薬はどれか。", ("赤", "青", "白"), ("b",), explanation="青は薬。", points=1),
    Question("2", "薬は薬はどれか。", ("赤", "青", "白"), ("c",), explanation="白は薬。", points=3, kinki=("b",)),
    Question("3", "薬は薬は薬はどれか。", ("赤", "青", "白"), ("a", "c"), points=1),
]


def chain_tokenizer():
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


def generate(engine, prompts, *, max_new_tokens, stop=None, **sampling):
    """The outputs of an engine, in the order of the prompts."""
    outputs = {}
    for indices, made in engine.batches(prompts, max_new_tokens, stop or Stop(), **sampling):
        outputs.update(zip(indices, made, strict=True))
    return [outputs[i] for i in range(len(prompts))]


def write_style(path, style=STYLE):
    """A prompt style as the YAML file that has it."""
    path.write_text(yaml.safe_dump(asdict(style) | {"stops": list(style.stops)}, allow_unicode=True))
    return str(path)


def write_exam(path):
    """QUESTIONS, and a fourth one that needs an image."""
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
