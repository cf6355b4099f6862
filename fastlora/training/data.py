"""Reading text and JSONL into token documents with a mask of what the loss looks at.

A document is rendered to text with spans of characters that carry loss, tokenized once as a whole
(so that its tokens are those the model sees at inference), and the spans are carried over to tokens
by the offsets.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import InputError

Span = tuple[int, int]
SHAPES = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True)
class Document:
    """``ids`` int32 [n] and ``target`` bool [n]: is this token one that the loss asks for."""

    ids: npt.NDArray[np.int32]
    target: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, start: int, end: int) -> Document:
        """Tokens ``start`` to ``end`` (views, no copy)."""
        return Document(self.ids[start:end], self.target[start:end])


def read_documents(path: str | Path, tokenizer: Any, loss_on: str = "answer") -> list[Document]:
    """All documents of ``path``: one for a .txt file, one a line for a .jsonl file.

    ``loss_on="answer"`` trains on completions and assistant turns, ``"all"`` on every token; plain
    text is always trained on whole. Raises ``InputError`` naming the file and the line.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(
            f"{path}: unknown kind of data file {path.suffix!r}; give a .txt or a .jsonl file"
        )
    text = _read_text(path)
    if not text.strip():
        raise InputError(f"{path} is empty: there is nothing to train on")
    if path.suffix == ".txt":
        return [_plain(text, tokenizer)]
    documents = []
    for number, record in _records(path, text):
        where = f"{path} line {number}"
        document = _encode_record(record, tokenizer, loss_on, where)
        if not document.target.any():
            raise InputError(
                f"{where}: no answer in this record, so no loss; remove it or use --loss-on all"
            )
        documents.append(document)
    return documents


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv"
        ) from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _records(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    # split("\n"), not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path} line {number}: not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path} line {number}: a JSON object is wanted, {type(record).__name__} found"
            )
        yield number, record


def _encode_record(record: dict[str, Any], tokenizer: Any, loss_on: str, where: str) -> Document:
    if "messages" in record:
        messages = _checked_messages(record["messages"], where)
        return encode_chat(messages, tokenizer, loss_on, where)
    if "prompt" in record and "completion" in record:
        prompt = _checked_text(record["prompt"], "prompt", where)
        completion = _checked_text(record["completion"], "completion", where)
        if loss_on == "all":
            return _plain(prompt + completion, tokenizer)
        return encode_answer(prompt, completion, tokenizer)
    if "text" in record:
        return _plain(_checked_text(record["text"], "text", where), tokenizer)
    raise InputError(f"{where}: keys {sorted(record)} are not understood; give {SHAPES}")


def _checked_text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key!r} must be a string, {type(value).__name__} found")
    return value


def _checked_messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: 'messages' must be a list with at least one message")
    for message in value:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and "content" in message
        ):
            raise InputError(f"{where}: each message needs a 'role' (string) and a 'content'")
    return value


def _plain(text: str, tokenizer: Any) -> Document:
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return _framed(ids, np.ones(len(ids), dtype=np.bool_), tokenizer)


def encode_answer(prompt: str, completion: str, tokenizer: Any) -> Document:
    """``prompt`` then ``completion``, no separator added; loss on the completion and EOS."""
    text = prompt + completion
    ids, target = _encode_spans(text, [(len(prompt), len(text))], tokenizer)
    return _framed(ids, target, tokenizer)


def _framed(ids: list[int], target: npt.NDArray[np.bool_], tokenizer: Any) -> Document:
    """BOS in front where this tokenizer puts one; EOS behind: the end is to be learnt too."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    has_bos = bos is not None and tokenizer("").input_ids[:1] == [bos]
    before = [bos] if has_bos and ids[:1] != [bos] else []
    after = [eos] if eos is not None and ids[-1:] != [eos] else []
    return Document(
        np.asarray([*before, *ids, *after], dtype=np.int32),
        np.concatenate([np.zeros(len(before), np.bool_), target, np.ones(len(after), np.bool_)]),
    )


def _encode_spans(
    text: str, spans: list[Span], tokenizer: Any
) -> tuple[list[int], npt.NDArray[np.bool_]]:
    """Token ids of ``text`` and, bool [n], which of them overlap a span of characters."""
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets, so answers cannot be told from prompts: "
            "use a model with a tokenizer.json, or --loss-on all"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts, ends = np.asarray(encoded.offset_mapping, dtype=np.int64).reshape(-1, 2).T
    target = np.zeros(len(starts), dtype=np.bool_)
    for low, high in spans:
        # A token that begins in the prompt and ends in the answer holds part of the answer: it
        # counts. An empty token (trimmed white space) belongs to where it stands.
        target |= (starts < high) & ((ends > low) | (starts >= low))
    return encoded.input_ids, target


# -- chat ------------------------------------------------------------------------------------------


def encode_chat(
    messages: list[dict[str, Any]], tokenizer: Any, loss_on: str, where: str
) -> Document:
    """A conversation through the chat template; loss on assistant turns, or on everything.

    A template that marks its answers with ``{% generation %}`` is believed. Otherwise an assistant
    turn is what rendering it adds to the prompt that would have asked for it.
    """
    template = tokenizer.chat_template
    if not template:
        raise InputError(
            f"{where}: 'messages' need a chat template and this tokenizer has none: use a chat (instruct) model, "
            "add chat_template.jinja to the model's directory, or turn the data into prompt/completion"
        )
    text = _render(messages, tokenizer, where, add_generation_prompt=False)
    if loss_on == "all":
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return Document(np.asarray(ids, dtype=np.int32), np.ones(len(ids), dtype=np.bool_))
    if isinstance(template, str) and re.search(r"\{%-?\s*generation\s*-?%\}", template):
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return Document(
            np.asarray(encoded["input_ids"], dtype=np.int32),
            np.asarray(encoded["assistant_masks"], dtype=np.bool_),
        )
    spans = [
        _turn_span(messages, index, text, tokenizer, where)
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    ids, target = _encode_spans(text, spans, tokenizer)
    return Document(np.asarray(ids, dtype=np.int32), target)


def _render(
    messages: list[dict[str, Any]], tokenizer: Any, where: str, add_generation_prompt: bool
) -> str:
    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template may raise anything: it is the model author's code
        raise InputError(f"{where}: the chat template refuses these messages ({error})") from None


def _turn_span(
    messages: list[dict[str, Any]], index: int, text: str, tokenizer: Any, where: str
) -> Span:
    """The characters of ``text`` that message ``index`` must produce, end-of-turn included."""
    if index == 0:
        asked = ""  # a conversation that the assistant opens: few templates render an empty prompt
    else:
        asked = _render(messages[:index], tokenizer, where, add_generation_prompt=True)
    answered = _render(messages[: index + 1], tokenizer, where, add_generation_prompt=False)
    if not (text.startswith(answered) and answered.startswith(asked)):
        raise InputError(
            f"{where}: this chat template rewrites earlier turns, so the answers cannot be located: use a template "
            "with {% generation %} marks, one answer per conversation, or --loss-on all"
        )
    # What follows the end-of-turn token (a line break, say) is never generated.
    stop = tokenizer.eos_token
    end = (
        answered.rfind(stop, len(asked)) + len(stop)
        if stop and stop in answered[len(asked) :]
        else len(answered)
    )
    return len(asked), end
