"""What a person sees: conversation, growing response, reward terms; terminals and pipes."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from tests.textenvs.toys import Chat, Echo, encode, say
from textenvs.envs.env import TextEnv
from textenvs.envs.rendering import Screen
from textenvs.envs.vector_env import TextVectorEnv

EOS = 0
COLOURS = {"blue": "\x1b[34m", "green": "\x1b[32m", "yellow": "\x1b[33m", "gray": "\x1b[37m"}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(text: Any) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", str(text))


def chat(**kwargs: Any) -> TextEnv:
    env = TextEnv(Chat, **kwargs)
    env.reset(seed=0, options={"example": 0})
    return env


def test_the_response_grows_token_by_token() -> None:
    env = chat(render_mode="ansi")
    assert plain(env.render()) == "  user: The food\n agent: ▏"
    for token in encode("fine food"):
        env.step(token)
    assert plain(env.render()) == "  user: The food\n agent: fine food▏"


def test_the_reward_terms_show_at_the_end_of_a_turn_only() -> None:
    env = chat(render_mode="ansi", reward=["task", ("length_penalty", 0.5)])
    tokens = len(encode("hm")) + 1
    say(env, "hm")
    lines = plain(env.render()).split("\n")
    assert lines[:2] == ["  user: The food", " agent: hm"]
    assert re.fullmatch(r"  user: Go on \d+", lines[2]) and lines[3] == " agent: ▏"
    assert lines[4] == f"reward: task +1.000, length_penalty {-tokens / 2:+.3f}"
    env.step(5)
    assert "reward" not in plain(env.render())
    env.reset()
    say(env, "stop")
    assert plain(env.render()).split("\n")[1:] == [
        " agent: stop",
        f"reward: task +1.000, length_penalty {-(len(encode('stop')) + 1) / 2:+.3f}",
    ]


def test_speakers_have_their_colours() -> None:
    env = chat(render_mode="ansi")
    say(env, "stop")
    text = str(env.render())
    assert f"{COLOURS['blue']}The food" in text
    assert f"{COLOURS['green']}stop" in text
    assert f"{COLOURS['yellow']}reward: task" in text


def test_half_a_character_can_be_shown() -> None:
    env = TextEnv(Echo, render_mode="ansi")
    env.reset(seed=0)
    env.step(encode("🙂")[0])
    assert "�" in plain(env.render())


def test_human_mode_writes_a_frame_a_turn_into_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    env = chat(render_mode="human")
    assert capsys.readouterr().out == ""
    env.step(5)
    assert capsys.readouterr().out == ""
    env.step(EOS)
    out = plain(capsys.readouterr().out)
    assert out.startswith("  user: The food") and out.endswith("reward: task +1.000\n")
    assert env.render() is None


def test_human_mode_redraws_a_terminal_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    env = chat(render_mode="human")
    first = terminal.getvalue()
    assert plain(first) == "  user: The food\n agent: ▏\n"
    env.step(5)
    assert terminal.getvalue().removeprefix(first).startswith("\x1b[2F\x1b[J")
    before = terminal.getvalue()
    env.reset(seed=0)
    assert "\x1b[2F" not in terminal.getvalue().removeprefix(before)  # the last frame stays


def test_a_screen_counts_wrapped_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("COLUMNS", "10")
    screen = Screen()
    screen.show("\x1b[34m" + "x" * 25 + "\x1b[0m\n\nend", first=True, last=False)
    screen.show("y", first=False, last=False)
    assert "\x1b[5F\x1b[Jy\n" in terminal.getvalue()


def test_a_vector_env_renders_each_slot() -> None:
    env = TextVectorEnv(Echo, 2, render_mode="ansi")
    env.reset(seed=0, options={"example": [0, 2]})
    frames = env.render()
    assert frames is not None
    assert [plain(frame).split("\n")[0] for frame in frames] == ["  user: The food", "  user: Why"]
