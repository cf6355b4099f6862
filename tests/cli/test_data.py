"""What the loss looks at, token by token, and what malformed files are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlora.training.data import encode_answer, encode_chat, read_documents
from fastlora.training.errors import InputError
from tests.tiny_tokenizer import make_tokenizer

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), max_size=12)
TOKENIZER = make_tokenizer()  # hypothesis wants it outside a function-scoped fixture


def split(document: Any, tokenizer: Any) -> tuple[str, str]:
    """The document as text, and the part of it that carries loss."""
    return tokenizer.decode(document.ids), tokenizer.decode(document.ids[document.target])


def test_plain_text_is_one_document_with_loss_everywhere(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text("To be,\nor not.", encoding="utf-8-sig")  # the byte order mark is not text
    (document,) = read_documents(path, tokenizer)
    assert tokenizer.decode(document.ids) == "To be,\nor not.<|im_end|>"
    assert document.target.all()


def test_prompt_completion_trains_on_the_completion_and_the_end(jsonl: Any, tokenizer: Any) -> None:
    path = jsonl({"prompt": "2 + 2 =", "completion": " 4"}, {"text": "x"})
    document, plain = read_documents(path, tokenizer)
    assert split(document, tokenizer) == ("2 + 2 = 4<|im_end|>", " 4<|im_end|>")
    assert split(plain, tokenizer) == ("x<|im_end|>", "x<|im_end|>")
    (document, _) = read_documents(path, tokenizer, loss_on="all")
    assert document.target.all()


@given(prompt=WORDS, completion=WORDS)
@settings(max_examples=150, deadline=None)
def test_answer_mask_is_the_tokens_of_the_answer(prompt: str, completion: str) -> None:
    document = encode_answer(prompt, completion, TOKENIZER)
    expected = [*TOKENIZER(completion, add_special_tokens=False).input_ids, TOKENIZER.eos_token_id]
    assert document.ids[document.target].tolist() == expected
    prompt_ids = TOKENIZER(prompt, add_special_tokens=False).input_ids
    assert document.ids.tolist() == prompt_ids + expected


def test_bos_is_put_in_front_where_the_tokenizer_does(jsonl: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    document = encode_answer("ab", "c", tokenizer)
    assert tokenizer.decode(document.ids) == "<|bos|>abc<|im_end|>"
    assert document.target.tolist() == [False, False, False, True, True]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Sun?"},
    {"role": "assistant", "content": "A star."},
    {"role": "user", "content": "Moon?"},
    {"role": "assistant", "content": "Not one."},
]


def test_chat_loss_is_on_assistant_turns_and_their_end_only(tokenizer: Any) -> None:
    document = encode_chat(CONVERSATION, tokenizer, "answer", "here")
    text, answers = split(document, tokenizer)
    assert text == tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    # The line break after <|im_end|> is the template's, never generated.
    assert answers == "A star.<|im_end|>Not one.<|im_end|>"
    assert encode_chat(CONVERSATION, tokenizer, "all", "here").target.all()


@given(turns=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_chat_mask_token_by_token_against_the_template(turns: list[tuple[str, str]]) -> None:
    messages, ids, target = [], [], []
    for question, answer in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
        for text, counts in (
            (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False),
            (f"{answer}<|im_end|>", True),
            ("\n", False),
        ):
            tokens = TOKENIZER(text, add_special_tokens=False).input_ids
            ids += tokens
            target += [counts] * len(tokens)
    document = encode_chat(messages, TOKENIZER, "answer", "here")
    assert document.ids.tolist() == ids
    assert document.target.tolist() == target


def test_generation_marks_of_a_template_are_believed() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}A:{% generation %}{{ m['content'] }}!{% endgeneration %}"
        "{% else %}Q:{{ m['content'] }} {% endif %}{% endfor %}"
    )
    messages = [{"role": "user", "content": "up"}, {"role": "assistant", "content": "down"}]
    assert split(encode_chat(messages, tokenizer, "answer", "here"), tokenizer) == (
        "Q:up A:down!",
        "down!",
    )


def test_a_template_that_rewrites_history_is_refused() -> None:
    tokenizer = make_tokenizer(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] if loop.last else '(cut)' }};{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    with pytest.raises(InputError, match=r"line 3: .*rewrites earlier turns.*--loss-on all"):
        encode_chat(CONVERSATION, tokenizer, "answer", "line 3")


def test_a_token_across_the_border_counts_as_answer() -> None:
    """With merges, ' 4' after '=' may be one token, and 'ab' + 'cd' may share one: it holds part
    of the answer.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<e>", "a", "b", "c", "d", "bc"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")
    document = encode_answer("ab", "cd", tokenizer)
    assert document.ids.tolist() == [1, 5, 4, 0]
    assert document.target.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', r"line 2: not valid JSON"),
        ("[1, 2]", r"line 2: a JSON object is wanted, list found"),
        ('{"question": "a"}', r"line 2: keys \['question'\] are not understood"),
        ('{"text": 3}', r"line 2: 'text' must be a string, int found"),
        ('{"prompt": "a", "completion": null}', r"line 2: 'completion' must be a string"),
        ('{"messages": []}', r"line 2: 'messages' must be a list with at least one"),
        ('{"messages": [{"content": "a"}]}', r"line 2: each message needs a 'role'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', r"line 2: no answer in this record"),
        ("[" * 100_000, r"line 2: not valid JSON"),
    ],
)
def test_malformed_lines_are_named(line: str, message: str, jsonl: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=message):
        read_documents(jsonl({"text": "fine"}, line), tokenizer)


def test_blank_lines_are_skipped_but_counted(jsonl: Any, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="line 4: not valid JSON"):
        read_documents(jsonl({"text": "a"}, "", "  ", "{"), tokenizer)
    assert len(read_documents(jsonl({"text": "a\u2028b"}, "", {"text": "c"}), tokenizer)) == 2


def test_messages_without_a_template(jsonl: Any) -> None:
    with pytest.raises(InputError, match="need a chat template and this tokenizer has none"):
        read_documents(jsonl({"messages": CONVERSATION}), make_tokenizer(chat_template=None))


def test_unreadable_files(tmp_path: Path, tokenizer: Any) -> None:
    for name, content, message in (
        ("empty.txt", b" \n\t\n", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("latin.txt", "café".encode("latin-1"), r"not UTF-8 text \(byte 3\)"),
        ("table.csv", b"a,b", r"unknown kind of data file '.csv'"),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_documents(path, tokenizer)
    with pytest.raises(InputError, match=r"cannot read .*nowhere.txt: No such file"):
        read_documents(tmp_path / "nowhere.txt", tokenizer)
