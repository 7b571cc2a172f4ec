"""Encoder-decoders: what is cached, shared and batched is what the plain model computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    GenerationConfig,
    PretrainedConfig,
    T5Config,
)

from agents.decoding import copies, seq2seq
from agents.decoding.copies import PREPACK_AFTER
from agents.decoding.prepacked import CastProduct, DecodeModel
from agents.decoding.tokens import Scope
from agents.models.layout import Seq2SeqLayout, Turn
from agents.models.probes import realistic_weights
from agents.models.seq2seq import Seq2SeqBackbone
from tests.agents.capabilities import DOCS, TESTED, row_of, takes_an_adapter
from tests.agents.helpers import compiled_by
from tests.agents.seq2seq import BART, FAMILIES, T5, VOCAB

PROMPT, RESPONSE = 9, 7


def backbone(family: str | PretrainedConfig, **options: Any) -> Seq2SeqBackbone:
    th.manual_seed(0)
    config = FAMILIES[family]() if isinstance(family, str) else family
    roles = config.eos_token_id, config.pad_token_id
    made = Seq2SeqBackbone(config, VOCAB, PROMPT, RESPONSE, *roles, **options)
    # T5 does not scale its attention: in float32 it rounds by more than would be seen here.
    made.model.double()
    return made


class Episodes:
    """Rows of random prompts and responses, which end at times of their own."""

    def __init__(self, model: Seq2SeqBackbone, rows: int = 5, budget: int = RESPONSE) -> None:
        self.random = np.random.default_rng(1)
        self.words = [t for t in range(3, VOCAB - 2) if t not in model.never_said]
        self.observation = {
            "prompt": np.zeros((rows, PROMPT), dtype=np.int64),
            "prompt_length": np.ones((rows, 1), dtype=np.int64),
            "response": np.zeros((rows, budget), dtype=np.int64),
            "response_length": np.zeros((rows, 1), dtype=np.int64),
        }
        for row in range(rows):
            self.begin(row)

    def begin(self, row: int) -> None:
        length = int(self.random.integers(1, PROMPT + 1))
        self.observation["prompt"][row] = 1
        self.observation["prompt"][row, :length] = self.random.choice(self.words, length)
        self.observation["prompt_length"][row] = length
        self.observation["response_length"][row] = 0

    def step(self) -> None:
        for row, said in enumerate(self.observation["response_length"][:, 0]):
            if said == self.observation["response"].shape[1] - 1 or self.random.random() < 0.2:
                self.begin(row)
            else:
                self.observation["response"][row, said] = self.random.choice(self.words)
                self.observation["response_length"][row] += 1

    def keep(self, rows: list[int]) -> None:
        self.observation = {name: array[rows] for name, array in self.observation.items()}


def documented(family: str) -> str:
    """Return a family's row in the table of the docs."""
    model = backbone(family)
    source, tokens = th.arange(3, 9)[None], th.tensor([[*model.prefix, 5, 6]])

    def forward() -> th.Tensor:
        return model.decode(tokens, model.encode(source, th.tensor([6])), th.tensor([6]))

    with th.enable_grad():
        return row_of(family, model.capabilities, takes_an_adapter(model.model, forward))


def close(actual: th.Tensor, expected: th.Tensor) -> None:
    assert th.allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached(family: str) -> None:
    """Over rows that end and begin when they like, and rows that leave."""
    model = backbone(family)
    assert model.capabilities.caches is None
    episodes = Episodes(model)
    with realistic_weights(model.model), th.no_grad():
        model.start_rollout(40)
        for step in range(40):
            close(model.next_hidden(episodes.observation), model.last_hidden(episodes.observation))
            if step == 20:
                model.keep_rows(np.array([3, 0, 4]))
                episodes.keep([3, 0, 4])
            if step == 30:  # as where a rollout begins in the middle of responses
                model.start_rollout(10)
            episodes.step()


@pytest.mark.parametrize("family", ["T5 1.0", "BART"])
def test_long_rollouts_are_run_by_copies_of_the_weights(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "fastest_product", lambda *_: CastProduct)
    model = backbone(family)
    episodes = Episodes(model)

    def step(scope: Scope = "rollout") -> bool:
        hidden = model.next_hidden(episodes.observation, scope)
        close(hidden, model.last_hidden(episodes.observation))
        close(model.next_logits(hidden), model.logits(hidden))
        return model.decoder.prepacked

    with th.no_grad(), realistic_weights(model.model):
        assert [step() for _ in range(PREPACK_AFTER + 1)] == [False] * PREPACK_AFTER + [True]
        assert model.decoder.copies.products
        for parameter in model.parameters():
            parameter.mul_(1.1)
        model.start_rollout(PREPACK_AFTER)
        assert [step(), step("predict"), step()] == [True, False, True]
        model.clear_cache()
        assert not model.decoder.prepacked and not model.decoder.copies.products


def test_a_head_is_copied_with_the_weights_also_where_the_trunk_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a CPU that does not multiply bfloat16."""
    product = {th.float32: CastProduct}
    monkeypatch.setattr(copies, "fastest_product", lambda _, dtype: product.get(dtype))
    model = backbone("BART", autocast=th.bfloat16)
    model.model.float()
    hidden = th.randn(3, model.hidden_size)
    for budget in (RESPONSE, 2 * RESPONSE, 2 * RESPONSE):
        model.start_rollout(PREPACK_AFTER)
        model.next_hidden(Episodes(model, budget=budget).observation)
        assert len(model.decoder.copies.products) == 1
        close(model.next_logits(hidden), model.logits(hidden))
        with th.no_grad():
            model.model.get_output_embeddings().weight.mul_(1.5)


@pytest.mark.parametrize(  # distances, and positions
    ("family", "layers"), [("T5 1.1", "num_decoder_layers"), ("Marian", "decoder_layers")]
)
def test_compiled_is_uncached(family: str, layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Likewise, without machine code; few programs, whatever the columns and the weights are."""
    traced: list[th.fx.GraphModule] = []

    def backend(graph: th.fx.GraphModule, _: list[th.Tensor]) -> Any:
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(seq2seq, "COLUMNS", 4)
    compiled_by(backend, monkeypatch)
    config = FAMILIES[family]()
    setattr(config, layers, 1)
    model = backbone(config, compiled=True)
    assert model.compiled and model.capabilities.compiles is None
    episodes = Episodes(model)
    with realistic_weights(model.model), th.no_grad():
        for scale in (1.0, 1.1):
            for parameter in model.parameters():
                parameter.mul_(scale)
            model.start_rollout(25)
            for _ in range(25):
                hidden = model.next_hidden(episodes.observation)
                close(hidden, model.last_hidden(episodes.observation))
                episodes.step()
    assert 1 <= len(traced) <= 4


@pytest.mark.parametrize("compiled", [False, True])
def test_responses_may_be_longer_than_in_training(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(th, "compile", lambda function, **_: function)
    model = backbone("Marian", compiled=compiled)
    with realistic_weights(model.model), th.no_grad():
        for budget in (RESPONSE, 4 * RESPONSE):
            episodes = Episodes(model, 3, budget)
            for _ in range(4 * RESPONSE):
                hidden = model.next_hidden(episodes.observation, "predict")
                close(hidden, model.last_hidden(episodes.observation))
                episodes.step()


def test_experts_are_not_compiled() -> None:
    with pytest.warns(UserWarning, match="are not compiled: what its experts read"):
        model = backbone("Switch", compiled=True)
    assert not model.compiled


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_are_what_the_plain_model_computes(family: str) -> None:
    """Logits and gradients: all turns at once, prompts shared, against one after the other."""
    model = backbone(family)
    random, layout = np.random.default_rng(0), Seq2SeqLayout(model.prefix)
    words = Episodes(model).words
    prompts = [random.choice(words, n) for n in (4, 9, 4)]
    asked = [prompts[i] for i in (0, 1, 0, 2)]
    turns = [Turn(p, random.choice(words, n)) for p, n in zip(asked, (3, 1, 6, 2), strict=True)]
    # A rollout began in the middle of this one: two tokens were said before.
    turns.append(Turn(np.concatenate([prompts[1], words[:2]]), np.array(words[2:5]), begun=2))
    rows = [layout.row([turn]) for turn in turns]
    batch = layout.collate(rows, model.config.pad_token_id or 0, "cpu")
    with realistic_weights(model.model), th.enable_grad():
        together = model.logits(model.hidden_states(batch))
        weights = th.as_tensor(random.normal(size=together.shape), dtype=th.float32)
        (together * weights).sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        assert gradients
        alone = []
        for context, actions, begun in turns:
            source, said = np.split(context, [len(context) - begun])
            read = [*model.prefix, *said, *actions[:-1]]
            output = model.model(
                input_ids=th.as_tensor(source[None]), decoder_input_ids=th.tensor([read])
            )
            alone.append(output.logits[0, len(model.prefix) - 1 + begun :])
        expected = th.cat(alone)
        close(together.detach(), expected.detach())
        (expected * weights).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            scale = float(parameter.grad.abs().max())
            difference = float((gradients[name] - parameter.grad).abs().max())
            assert difference <= 1e-4 * max(scale, 1e-3), name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_docs_tell_what_each_can(family: str) -> None:
    assert not TESTED or documented(family) in DOCS.read_text()


# Of Switch, `generate` itself fails in transformers 5.23.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Switch"])
def test_greedy_tokens_are_generates(family: str) -> None:
    model, prompts = backbone(family), 200
    model.model.generation_config.forced_eos_token_id = None
    episodes = Episodes(model, prompts)
    observation = episodes.observation
    eos = model.config.eos_token_id
    lengths = observation["prompt_length"]
    real = th.as_tensor((np.arange(PROMPT) < lengths).astype(np.int64))
    settings = GenerationConfig(
        max_new_tokens=RESPONSE + len(model.prefix) - 1,
        min_new_tokens=None,
        do_sample=False,
        num_beams=1,
        eos_token_id=eos,
        pad_token_id=model.config.pad_token_id,
        decoder_start_token_id=model.prefix[0],
        forced_bos_token_id=model.prefix[1] if len(model.prefix) > 1 else None,
        suppress_tokens=list(model.never_said) or None,
    )
    with realistic_weights(model.model), th.no_grad():
        generated = model.model.generate(  # type: ignore[operator]
            th.as_tensor(observation["prompt"]), attention_mask=real, generation_config=settings
        )[:, len(model.prefix) :]
        said = np.zeros((prompts, RESPONSE), dtype=np.int64)
        for at in range(RESPONSE):
            logits = model.logits(model.next_hidden(observation))
            logits[:, list(model.never_said)] = -th.inf
            said[:, at] = logits.argmax(dim=1).numpy()
            if at < RESPONSE - 1:
                observation["response"][:, at] = said[:, at]
                observation["response_length"][:] += 1
    for ours, theirs in zip(said.tolist(), generated.tolist(), strict=True):
        end = ours.index(eos) + 1 if eos in ours else RESPONSE
        assert ours[:end] == theirs[:end]


@pytest.mark.parametrize("unseen", [False, True])
def test_weights_that_change_are_noticed(unseen: bool) -> None:
    model = backbone("T5 1.0")
    episodes = Episodes(model)
    with th.no_grad():
        model.next_hidden(episodes.observation)
        episodes.step()
        for parameter in model.parameters():
            # PyTorch does not count what is done to the data of a parameter.
            (parameter.data if unseen else parameter).mul_(1.1)
        close(model.next_hidden(episodes.observation), model.last_hidden(episodes.observation))
        episodes.step()
        # What predictions ask in between changes nothing, not even a rounding.
        other = backbone("T5 1.0")
        other.load_state_dict(model.state_dict())
        model.next_hidden(Episodes(model).observation, "predict")
        close(model.next_hidden(episodes.observation), other.last_hidden(episodes.observation))


@pytest.mark.parametrize("family", ["T5 1.1", "BART", "T5Gemma"])
def test_layers_that_read_the_same_are_one_product(family: str) -> None:
    """Of cross-attention, steps need the queries alone."""
    decoder: Any = backbone(family).model.get_decoder()
    made = DecodeModel(CastProduct, th.float64)
    made.of(decoder)
    layers = len(getattr(decoder, "layers", getattr(decoder, "block", ())))
    together = [product for product in made.products if len(product._layers) == 3]
    assert len(together) == layers
    alone = {id(layer) for p in made.products if len(p._layers) == 1 for layer in p._layers}
    crossing = ("encoder_attn", "EncDecAttention", "cross_attn")
    for name, module in decoder.named_modules():
        if name.endswith(crossing):
            assert {id(m) for m in module.children() if isinstance(m, th.nn.Linear)} <= alone


@pytest.mark.parametrize("scope", ["rollout", "predict"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_remembered_after_an_exception(scope: Any, error: Any) -> None:
    model = backbone("T5 1.0")
    episodes = Episodes(model)
    layers = model.model.get_decoder().block

    def fail(*_: Any) -> Any:
        raise error("in the middle")

    with th.no_grad():
        model.next_hidden(episodes.observation, scope)
        episodes.step()
        hook = layers[1].register_forward_hook(fail)
        with pytest.raises(error, match="in the middle"):
            model.next_hidden(Episodes(model).observation, scope)
        hook.remove()
        answer = model.next_hidden(episodes.observation, scope)
        close(answer, model.last_hidden(episodes.observation))


def test_a_bias_behind_the_output_layer_is_the_backbones(tmp_path: Path) -> None:
    model = backbone("BART")
    bias: Any = model.model.final_logits_bias
    bias.copy_(th.randn(bias.shape))
    source, tokens = th.arange(3, 9)[None], th.tensor([[*model.prefix, 5, 6]])
    with th.no_grad():
        hidden = model.decode(tokens, model.encode(source, th.tensor([6])), th.tensor([6]))
        expected = model.model(input_ids=source, decoder_input_ids=tokens).logits
        close(model.logits(hidden), expected)
        close(model.next_logits(hidden), expected)


@pytest.mark.parametrize("family", ["BART", "Marian", "T5 1.0", "mBART", "M2M100"])
def test_no_embedding_is_kept_as_it_is(family: str) -> None:
    """Padding is what many decoders start with, and some models pad with EOS."""
    model = backbone(family)
    for half in (model.model, model.model.get_encoder(), model.model.get_decoder()):
        assert half.get_input_embeddings().padding_idx is None
    tokens = th.tensor([[model.config.pad_token_id, 5]])
    with th.enable_grad():
        encoded = model.encode(th.tensor([[5, 6]]), th.tensor([2])).detach()
        model.decode(tokens, encoded, th.tensor([2])).square().sum().backward()
    gradient: Any = model.model.get_decoder().get_input_embeddings().weight.grad
    assert gradient[model.config.pad_token_id].abs().max() > 0


@pytest.mark.parametrize("adapter", [None, {"r": 2}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_is_the_model(
    family: str, adapter: dict[str, Any] | None, tmp_path: Path
) -> None:
    model = backbone(family, adapter=adapter)
    with th.no_grad():
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_merged(tmp_path)
    roles = model.config.eos_token_id, model.config.pad_token_id
    again = Seq2SeqBackbone(str(tmp_path), VOCAB, PROMPT, RESPONSE, *roles)
    again.model.double()
    assert again.prefix == model.prefix and model.config.forced_bos_token_id in (
        None,
        *model.prefix,
    )
    if adapter is None:
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).double()
        for name, value in loaded.state_dict().items():
            assert th.equal(value, model.model.state_dict()[name]), name
    rows = Episodes(model).observation
    close(again.logits(again.last_hidden(rows)), model.logits(model.last_hidden(rows)))


def test_how_much_each_half_reads() -> None:
    assert backbone("T5 1.0").longest_prompt(10**6) == math.inf
    bart = backbone("mBART")  # of 64 positions, whose decoder reads two tokens first
    assert [bart.longest_prompt(said) for said in (62, 63)] == [64, 0]
    gemma = FAMILIES["T5Gemma"]()
    gemma.encoder.sliding_window, gemma.decoder.sliding_window = 20, 30
    made = Seq2SeqBackbone(gemma, VOCAB, PROMPT, RESPONSE)
    assert [made.longest_prompt(said) for said in (29, 30)] == [20, 0]


def test_experts_of_few_tokens_are_not_cached() -> None:
    """Beyond its capacity an expert passes over a row's later tokens, if they come at once."""
    config = FAMILIES["Switch"]()
    config.expert_capacity = RESPONSE + 1
    assert Seq2SeqBackbone(config, VOCAB, PROMPT, RESPONSE).longest_prompt(RESPONSE) == math.inf
    assert Seq2SeqBackbone(config, VOCAB, PROMPT, RESPONSE).longest_prompt(RESPONSE + 1) == 0
    config.expert_capacity = RESPONSE
    with pytest.warns(UserWarning, match="its experts read 7 tokens of a row"):
        model = Seq2SeqBackbone(config, VOCAB, PROMPT, RESPONSE)
    assert model.longest_prompt(RESPONSE + 1) == math.inf


def test_what_is_refused_or_told() -> None:
    config = T5Config(**{**T5, "decoder_start_token_id": None})
    with pytest.raises(ValueError, match=r"no decoder_start_token_id.*T5: the padding token"):
        Seq2SeqBackbone(config, VOCAB, PROMPT, RESPONSE)
    beyond = BartConfig(**{**BART, "decoder_start_token_id": 500})
    with pytest.raises(ValueError, match="has 97 tokens, but its decoder would read 500 first"):
        Seq2SeqBackbone(beyond, VOCAB, PROMPT, RESPONSE)
    short = BartConfig(**{**BART, "max_position_embeddings": 6})
    with pytest.raises(ValueError, match=r"Prompts may have 9 tokens.* only 6 positions"):
        Seq2SeqBackbone(short, VOCAB, PROMPT, 4)
    with pytest.raises(ValueError, match=r"Responses, .* may have 8 tokens.* only 6 positions"):
        Seq2SeqBackbone(short, VOCAB, 6, RESPONSE)
    for half, what in (("encoder", "Prompts"), ("decoder", "Responses")):
        windowed = FAMILIES["T5Gemma"]()
        getattr(windowed, half).sliding_window = 5
        with pytest.raises(ValueError, match=f"{what}.* may .* a sliding window of 5 tok"):
            Seq2SeqBackbone(windowed, VOCAB, PROMPT, RESPONSE)
    with pytest.raises(ValueError, match="has 98 tokens but the model reads only 97"):
        Seq2SeqBackbone(BartConfig(**BART), VOCAB + 1, PROMPT, RESPONSE)


def test_settings_of_generate_are_told(tmp_path: Path) -> None:
    model = backbone("BART").model
    model.generation_config.no_repeat_ngram_size = 3
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"no_repeat_ngram_size=3\. .*samples without"):
        Seq2SeqBackbone(str(tmp_path), VOCAB, PROMPT, RESPONSE)
