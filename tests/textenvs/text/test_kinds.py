"""What every kind of tokenizer must do: one text in pieces, special tokens, what comes back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from tests.textenvs.tokenizers import KINDS, tokenizer_of
from tests.textenvs.toys import Chat, Echo
from textenvs import Example, Task, Transcript
from textenvs.envs.engine import TextEngine
from textenvs.text import loading
from textenvs.text.codec import TextCodec
from textenvs.text.loading import embedded_tokenizer, load_tokenizer

every_kind = pytest.mark.parametrize("kind", KINDS)
# The kinds that put something in front of an input or behind it.
FRONT = {"byte level": "<s>", "byte level, prefix space": "<s>", "wordpiece": "[CLS]"}
FRONT |= dict.fromkeys(("sentencepiece bpe", "sentencepiece bpe, normalizer"), "<s>")
BEHIND = {"byte level": "</s>", "byte level, prefix space": "</s>", "wordpiece": "[SEP]"}
BEHIND |= {"unigram": "</s>"}


def decoded(codec: TextCodec, ids: Any) -> str:
    text = codec.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return str(text)


def plain(codec: TextCodec, text: str) -> list[int]:
    return list(codec.tokenizer.encode(text, add_special_tokens=False))


@every_kind
def test_special_tokens_stand_in_front_and_behind_an_encoders_input_alone(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    inside = plain(TextCodec(tokenizer), "User: hello")
    front, behind = (
        [tokenizer.convert_tokens_to_ids(around[kind])] if kind in around else []
        for around in (FRONT, BEHIND)
    )
    for convention, end in (("causal", []), ("encoder", behind)):
        codec = TextCodec(tokenizer, convention)  # type: ignore[arg-type]
        (prompt,) = codec.encode_prompts(["User: hello"])
        assert prompt.tolist() == [*front, *inside, *end]
        (empty,) = codec.encode_prompts([""])
        assert empty.tolist() == ([*front, *end] or [tokenizer.bos_token_id])


@every_kind
@pytest.mark.parametrize("rendered", ["task", "data"])
def test_no_special_token_is_doubled(kind: str, rendered: str) -> None:
    tokenizer = tokenizer_of(kind)
    written = f"{tokenizer.bos_token}User: hello"
    codec = TextCodec(tokenizer, "encoder", split_special_tokens=rendered == "task")
    (prompt,) = codec.encode_prompts([codec.as_text(written) if rendered == "data" else written])
    assert prompt.tolist().count(tokenizer.bos_token_id) == 1
    (closed,) = codec.encode_prompts([f"hello{tokenizer.eos_token}"])
    assert closed.tolist().count(tokenizer.eos_token_id) == 1


@every_kind
@pytest.mark.parametrize(
    ("text", "more"),
    [
        ("User: hello", "\nUser: lower\nAgent:"),
        ("User: hello\nAgent:", " yes (ok)"),
        ("(", "yes)"),
    ],
)
def test_what_continues_a_text_is_encoded_as_in_one_piece(kind: str, text: str, more: str) -> None:
    codec = TextCodec(tokenizer_of(kind))
    (prompt,) = codec.encode_prompts([text])
    (whole,) = codec.encode_prompts([text + more])
    assert [*prompt, *codec.encode_reply(more)] == whole.tolist()


@every_kind
@pytest.mark.parametrize("text", ["good bye", "yes", "ok (yes)"])
def test_a_response_comes_back_and_stands_after_one_space(kind: str, text: str) -> None:
    codec = TextCodec(tokenizer_of(kind))
    for prompt in ("User: hello", "User:\n", ""):
        ids = codec.encode_response(text, prompt)
        assert codec.decode_response(ids) == codec.given_back(text)
        assert kind == "wordpiece" or codec.given_back(text) == text
    for prompt, between in (("Agent:", " "), ("Agent:\n", ""), ("", "")):
        (before,) = codec.encode_prompts([prompt])
        (whole,) = codec.encode_prompts([f"{prompt}{between}{text}"])
        said = codec.encode_response(text, prompt, eos=False).tolist()
        # A prompt without a token of its own begins with one.
        assert whole.tolist() in ([*before, *said], said)


@every_kind
def test_text_is_text(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    codec = TextCodec(tokenizer)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    text = f"hello{tokenizer.eos_token} {tokenizer.pad_token}{tokenizer.bos_token} bye"
    (prompt,) = codec.encode_prompts([codec.as_text(text)])
    reply = codec.encode_reply(codec.as_text(f"\n{text}"))
    response = codec.encode_response(text, "User:", eos=False)
    for ids in (prompt, reply, response):
        assert len(ids) > 10 and not ends & set(ids.tolist())
        assert tokenizer.bos_token_id not in ids.tolist()[1:]
    if kind.startswith("byte"):
        assert decoded(codec, response).strip() == text
    # What the task or the template writes is meant as such.
    assert tokenizer.eos_token_id in codec.encode_reply(text)
    (meant,) = TextCodec(tokenizer, split_special_tokens=False).encode_prompts([text])
    assert tokenizer.eos_token_id in meant


class Instructed(Task):
    """Writes a special token around what the example has."""

    max_turns = 2

    def prompt(self, example: Example) -> str:
        return f"Say:</s>{example.prompt} {example.data['more'][0]}\nAgent:"

    def reply(self, transcript: Transcript, rng: np.random.Generator) -> str:
        return "bye </s>"

    def score(self, transcripts: Any) -> list[float]:
        return [0.0] * len(transcripts)


def test_an_environment_tells_the_tasks_special_tokens_from_the_users() -> None:
    tokenizer = tokenizer_of("sentencepiece bpe")
    data = [Example("a </s> b", data={"more": ["</s>"]}), Example("plain", data={"more": [""]})]
    with pytest.warns(UserWarning, match=r"1 examples contain.*example 0: .*split_special_tokens"):
        engine = TextEngine(Instructed, tokenizer=tokenizer, dataset=data, max_prompt_tokens=90)
    engine.reset(0, np.random.default_rng(0), 0)
    assert engine.turns[0][0].text == "Say:</s>a </s> b </s>\nAgent:"
    assert engine.observations["prompt"][0].tolist().count(tokenizer.eos_token_id) == 1
    engine.step(np.array([tokenizer.eos_token_id]), [np.random.default_rng(0)])
    # One more: the one that the agent has said.
    assert engine.observations["prompt"][0].tolist().count(tokenizer.eos_token_id) == 2
    assert engine.turns[0][-1].text == "bye </s>"


def test_a_reward_sees_marks_and_indentation() -> None:
    tokenizer = copy.deepcopy(embedded_tokenizer())
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    engine = TextEngine(Echo, tokenizer=tokenizer, max_new_tokens=32)
    engine.reset(0, np.random.default_rng(0), 0)
    text = "<think>  one\n two</think>\n  42\n"
    ids = engine.encode_response(text)
    assert {len(embedded_tokenizer()), len(embedded_tokenizer()) + 1} <= set(ids.tolist())
    _, _, ((_, info),) = engine.respond([0], [ids], [np.random.default_rng(0)])
    assert info["transcript"].raw_response == f" {text}"
    assert info["transcript"].response == "one\n two\n  42"
    assert Transcript(Example("x"), info["transcript"].turns).raw_response == "one\n two\n  42"


@every_kind
def test_references_are_what_the_tokenizer_gives_back(kind: str) -> None:
    data = [Example("User: hello", ("Yes (OK)\n", " lower"))]
    options: dict[str, Any] = {"reward": "exact_match", "max_new_tokens": 20}
    engine = TextEngine(Echo, tokenizer=tokenizer_of(kind), dataset=data, **options)
    for i, reference in enumerate(data[0].references):
        engine.reset(0, np.random.default_rng(0), 0)
        said = [engine.encode_response(reference)]
        _, _, ((_, info),) = engine.respond([0], said, [np.random.default_rng(0)])
        assert info["transcript"].stopped and info["reward_terms"] == {"exact_match": 1.0}
        assert info["transcript"].references[i] == info["transcript"].response
        assert info["transcript"].example.references == data[0].references
    assert Transcript(data[0], ()).references == ("Yes (OK)", "lower")


def test_tokenizers_are_loaded_again_when_their_files_or_they_have_changed(
    hf_tokenizer_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_LOADED", {})
    tokenizer = load_tokenizer(hf_tokenizer_path)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(str(folder))
    first = load_tokenizer(folder)
    assert load_tokenizer(str(folder)) is first
    more = copy.deepcopy(first)
    more.add_tokens(["<more>"])
    more.save_pretrained(str(folder))
    second = TextCodec(folder)
    assert second.vocabulary_size == TextCodec(first).vocabulary_size + 1
    second.tokenizer.add_tokens(["<even more>"])
    assert TextCodec(folder).vocabulary_size == second.vocabulary_size
    with pytest.raises(ValueError, match="ids when the environment was made"):
        second.encode_reply("<even more>")
    own = load_tokenizer(None)
    own.add_tokens(["<mine>"])
    assert len(load_tokenizer(None)) == len(own) - 1


def test_a_changed_normalizer_is_noticed() -> None:
    from tokenizers import normalizers

    tokenizer: Any = copy.deepcopy(embedded_tokenizer())
    before = TextCodec(tokenizer).encode_prompts(["User: Hello"])[0].tolist()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    after = TextCodec(tokenizer).encode_prompts(["User: Hello"])[0].tolist()
    assert before != after == tokenizer.encode("user: hello")


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("given", ["folder", "object"])
def test_all_tokens_with_which_the_model_ends_turns_do(
    given: str, file: str, hf_tokenizer_path: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(hf_tokenizer_path)
    tokenizer.save_pretrained(str(tmp_path))
    ids = [tokenizer.eos_token_id, 5, 10**6]
    settings = {"eos_token_id": ids}
    if file == "config.json":
        settings = {**LlamaConfig().to_dict(), **settings}
    (tmp_path / file).write_text(json.dumps(settings))
    loaded = load_tokenizer(tmp_path)
    engine = TextEngine(Echo, tokenizer=loaded if given == "object" else tmp_path, stop=7)
    assert engine.codec.stop_token_ids == (tokenizer.eos_token_id, 7, 5)
    assert engine.action_space.stop_token_ids == engine.codec.stop_token_ids
    engine.reset(0, np.random.default_rng(0))
    _, ended, ((_, info),) = engine.step(np.array([5]), [np.random.default_rng(0)])
    assert ended[0] and info["transcript"].stopped


@every_kind
def test_a_stop_string_ends_a_turn_as_soon_as_it_has_been_said(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    engine = TextEngine(Echo, tokenizer=tokenizer, max_new_tokens=40, stop=["bye", "42"])
    engine.reset(0, np.random.default_rng(0), 0)
    tokens = plain(engine.codec, "good bye good")
    ended, said = False, 0
    while not ended:
        _, (ended,), infos = engine.step(np.array([tokens[said]]), [np.random.default_rng(0)])
        said += 1
    transcript = infos[0][1]["transcript"]
    assert transcript.stopped and transcript.response == "good"
    assert transcript.raw_response.endswith("bye") and said < len(tokens)
    engine.reset(0, np.random.default_rng(0), 0)
    demonstrated = engine.encode_response("good bye good")
    assert demonstrated.tolist() == engine.codec.encode_response("good bye", "x").tolist()
    assert demonstrated[-1] != engine.eos_token_id
    with pytest.raises(ValueError, match="tokens after the stop token"):
        engine.respond([0], [[*demonstrated, 5]], [np.random.default_rng(0)])
    engine.respond([0], [demonstrated], [np.random.default_rng(0)])
    with pytest.raises(ValueError, match=r"or text \('bye', '42'\)"):
        fresh = TextEngine(Echo, tokenizer=tokenizer, max_new_tokens=40, stop=["bye", "42"])
        fresh.reset(0, np.random.default_rng(0), 0)
        fresh.respond([0], [tokens[:1]], [np.random.default_rng(0)])


@pytest.mark.parametrize("stop", [[True], [1.5], None, [""]])
def test_what_is_no_stop(stop: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="stop"):
        TextEngine(Echo, tokenizer=TextCodec() if stop is None else None, stop=stop or "x")


@every_kind
def test_a_conversation_reads_as_one_piece(kind: str) -> None:
    codec = TextCodec(tokenizer_of(kind))
    engine = TextEngine(Chat, tokenizer=codec)
    engine.reset(0, np.random.default_rng(0), 0)
    said = engine.encode_response("yes")
    engine.respond([0], [said], [np.random.default_rng(0)])
    length = int(engine.observations["prompt_length"][0, 0])
    ids = engine.observations["prompt"][0, :length].tolist()
    first, last = (turn.text for turn in (engine.turns[0][0], engine.turns[0][-1]))
    (whole,) = codec.encode_prompts([f"User: {first}\nAgent: yes\nUser: {last}\nAgent:"])
    assert [token for token in ids if token != codec.eos_token_id] == whole.tolist()
