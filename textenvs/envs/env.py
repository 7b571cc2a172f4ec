"""One text environment: a one-slot view of the engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded

from textenvs.data.sampler import Sampling
from textenvs.envs.arguments import check_arguments, check_options
from textenvs.envs.engine import Info, TextEngine
from textenvs.envs.observations import Observation
from textenvs.envs.rendering import Screen, render_ansi
from textenvs.envs.state import generator_from, generator_state
from textenvs.task import Task
from textenvs.text.codec import TextCodec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextEnv(gym.Env[Observation, np.int64]):
    """A text task, one token a step.

    ## Description
    The agent reads a prompt and writes a response token by token. In a dialogue the user answers
    each response, the prompt grows by both, and the agent writes the next one.

    ## Action Space
    `TokenSpace(len(tokenizer))`, a `Discrete`: the next token. EOS ends the turn, and so does each
    of the space's `stop_token_ids`. Where the task has choices, the space knows their tokens.

    ## Observation Space
    A `Dict` of int64 `Box`es, right-padded with the pad id: `prompt` (max_prompt_tokens,),
    `prompt_length` (1,), `response` (max_new_tokens,), `response_length` (1,). In a dialogue,
    `prompt` is the whole conversation so far, the agent's turns exactly as it emitted them.

    ## Rewards
    The sum of the reward terms, on the last token of a turn; 0 on every other step.

    ## Episode End
    Terminated when the agent ends its last turn (EOS or another stop, or the response budget is
    used up), or when the user ends the conversation. Truncated when the conversation no longer fits
    the prompt budget, which a warning says, and by `max_episode_steps`.

    ## Information
    At the end of a turn: `transcript` (a `Transcript`), `reward_terms` (a number for each term) and
    `observed` (a number for each term that is only observed, if there are any for this turn).
    At the end of an episode also `example` (its index) and, if the task defines it, `is_success`.

    Args:
        task: A registered id, "package.module:Class", a `Task` class or a `Task`.
        tokenizer: None (the embedded one), a name or path, a tokenizer (never changed), or a
            `textenvs.text.codec.TextCodec`, which says how to use one.
        dataset: None (the task's own data) or what `textenvs.data.sources.load_examples` takes.
        fields: Which columns of the dataset hold `prompt`, `references`, ...
        split: "train", "validation", "test", or a part such as "train[:90%]".
        reward: None (the task's own) or what `textenvs.rewards.resolve_rewards` takes.
        observe: The same, for what is scored and reported but no part of the reward.
        choices: The only responses allowed. None: the task's, or the labels of the dataset.
        template: The text around the prompt, as "Review: {prompt} Label:". None: the task's.
        max_prompt_tokens: The prompt budget. None: the task's, else as long as the longest prompt.
        max_new_tokens: The response budget of a turn, EOS included. None: the task's.
        truncate_prompt: Which side of an example's text to cut off where its prompt is over the
            budget; what the task puts around it stays. None: raise an error.
        reply_tokens: How many tokens a user's reply is taken to have where a conversation's prompt
            budget is not given. None: 32.
        stop: Texts and token ids that end a turn, besides EOS and what the generation_config.json
            in the tokenizer's folder has.
        chat_template: Whether a chat template writes prompts and replies. "auto": where the
            tokenizer has one; True; False; else a Jinja template, or a file that holds one.
        system_prompt: What a chat begins with. None: the task's, if it has one.
        sampling: Which example is played next: "random", by the environment's generator, or
            "epoch", each once before any is played again.
        render_mode: "ansi" (text), "human" (written to the terminal as it goes), or None.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["ansi", "human"],
        "render_fps": 20,
    }

    def __init__(
        self,
        task: str | Task | type[Task],
        tokenizer: str | Path | PreTrainedTokenizerBase | TextCodec | None = None,
        dataset: Any = None,
        fields: Mapping[str, str] | None = None,
        split: str = "train",
        reward: Any = None,
        observe: Any = None,
        choices: Sequence[str] | None = None,
        template: str | None = None,
        max_prompt_tokens: int | None = None,
        max_new_tokens: int | None = None,
        truncate_prompt: Literal["left", "right"] | None = None,
        reply_tokens: int | None = None,
        stop: str | int | Sequence[str | int] | None = None,
        chat_template: bool | str | Path = "auto",
        system_prompt: str | None = None,
        sampling: Sampling = "random",
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        if "group_size" in unknown:
            raise TypeError(
                "Groups are slots side by side: gym.make_vec(..., num_envs=..., group_size=...) "
                "has them, and a single environment has not."
            )
        check_arguments(type(self), unknown)
        if render_mode not in (None, *self.metadata["render_modes"]):
            # SB3 tries render_mode="rgb_array" and, after a TypeError, no render mode.
            raise TypeError(
                f"render_mode must be None, 'ansi' or 'human', but it is {render_mode!r}."
            )
        self.engine = TextEngine(
            task,
            tokenizer=tokenizer,
            dataset=dataset,
            fields=fields,
            split=split,
            reward=reward,
            observe=observe,
            choices=choices,
            template=template,
            max_prompt_tokens=max_prompt_tokens,
            max_new_tokens=max_new_tokens,
            truncate_prompt=truncate_prompt,
            reply_tokens=reply_tokens,
            stop=stop,
            chat_template=chat_template,
            system_prompt=system_prompt,
            sampling=sampling,
        )
        self.observation_space: Any = self.engine.observation_space
        self.action_space = self.engine.action_space
        self.render_mode = render_mode
        self._screen = Screen() if render_mode == "human" else None
        self._info: Info = {}
        self._running = False

    @property
    def task(self) -> Task:
        """The task."""
        return self.engine.task

    @property
    def codec(self) -> TextCodec:
        """How text becomes tokens."""
        return self.engine.codec

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self.engine.tokenizer

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, Info]:
        """Start an episode; `options={"example": i}` picks the example."""
        super().reset(seed=seed)
        check_options(options, ("example",))
        example = (options or {}).get("example")
        index = None if example is None else int(example)
        if seed is not None:
            self.engine.draw_from_the_first([0])
        self.engine.reset(0, self.np_random, index, [self.np_random_seed])
        self._info, self._running = {}, True
        self._show(first=True)
        return self._observation(), {}

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, Info]:
        """Append a token to the response."""
        if not self._running:
            raise ResetNeeded("The episode is over or has not started: call reset() before step().")
        actions = np.asarray(action).reshape(-1)
        if actions.shape != (1,) or not np.issubdtype(actions.dtype, np.integer):
            raise ValueError(
                f"An action must be one token id, an integer in [0, {self.engine.action_space.n}), "
                f"but it is {action!r}."
            )
        rewards, ended, infos = self.engine.step(actions.astype(np.int64), (self.np_random,))
        self._info = infos[0][1] if infos else {}
        self._running = not ended[0]
        truncated = bool(ended[0] and self._info["transcript"].truncated)
        terminated = bool(ended[0]) and not truncated
        self._show()
        # A copy: wrappers write into what they are given, and rendering needs it as it was.
        info = dict(self._info)
        return self._observation(), float(rewards[0]), terminated, truncated, info

    def render(self) -> str | None:
        """Return the conversation as coloured text ("ansi"), or nothing."""
        if self.render_mode is None:
            gym.logger.warn(
                "You are calling render without a render mode: "
                'pass gym.make(..., render_mode="ansi").'
            )
            return None
        return render_ansi(self.engine, 0, self._info) if self.render_mode == "ansi" else None

    def get_state(self) -> dict[str, Any]:
        """Return where the episode and the generator stand, as plain data.

        What wrappers count by themselves (`TimeLimit`'s steps) is not in it.
        """
        return {
            "engine": self.engine.get_state(),
            "generator": generator_state(self._np_random),
            "seed": self._np_random_seed,
            "running": self._running,
            "info": dict(self._info),
        }

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_state` returned, here or in an environment made alike.

        Raises:
            ValueError: If the state is that of an environment with other examples or budgets.
        """
        self.engine.set_state(state["engine"])
        self._np_random = generator_from(state["generator"])
        self._np_random_seed = state["seed"]
        self._running = state["running"]
        self._info = dict(state["info"])

    # An attribute, which Gymnasium and SB3 can get and set in worker processes by its name.
    text_state = property(get_state, set_state)

    def _show(self, first: bool = False) -> None:
        if self._screen is not None:
            frame = render_ansi(self.engine, 0, self._info)
            self._screen.show(frame, first=first, last=bool(self._info))

    def _observation(self) -> Observation:
        return {key: array[0].copy() for key, array in self.engine.observations.items()}
