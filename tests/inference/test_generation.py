import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.decoders import CONFIG, MIXED, WINDOW

from spiel_jax.inference import generation
from spiel_jax.inference.choosing import Choice, choose
from spiel_jax.inference.generation import continuations
from spiel_jax.inference.requests import Request
from spiel_jax.inference.sampling import generate
from spiel_jax.inference.served import Served, slots_for
from spiel_jax.models import init_params
from spiel_jax.models.cache import init_past
from spiel_jax.models.decoder import ADAPTED
from spiel_jax.models.storage import NF4


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


ROWS = 3
"""Of the batches here, whose texts have 64 tokens at most: so that most tests run the same programs."""


def prompts(count=9, longest=30):
    """Of mixed lengths; some begin alike."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 96, longest).tolist()
    own = [rng.integers(0, 96, rng.integers(1, longest)).tolist() for _ in range(count)]
    return [shared + tokens[:10] if number % 3 == 0 else tokens for number, tokens in enumerate(own)]


def requests(texts, **options):
    rng = np.random.default_rng(1)
    limits = [int(rng.integers(1, 24)) for _ in texts]
    return [
        Request(tokens=tokens, max_new_tokens=limit, draw=number, **options)
        for number, (tokens, limit) in enumerate(zip(texts, limits, strict=True))
    ]


class TestContinuations:
    @pytest.mark.parametrize(
        ("config", "longest"),
        [
            pytest.param(CONFIG, 30, id="full"),
            *(
                pytest.param(*case, marks=pytest.mark.slow)
                for case in [(CONFIG, 150), (WINDOW, 80), (MIXED, 80)]
            ),
        ],
    )
    def test_equal_those_of_one_batch_without_refill(self, params, config, longest):
        asked = requests(prompts(longest=longest))
        whole = generate(config, params, [r.tokens for r in asked], max_new_tokens=24)
        found = continuations(Served(config, params), asked, most_rows=ROWS + 1)  # and 1, for what is left
        assert found == [row[: r.max_new_tokens] for row, r in zip(whole, asked, strict=True)]

    def test_stop_tokens(self, params):
        asked = requests(prompts())
        served = Served(CONFIG, params)
        free = continuations(served, asked, most_rows=ROWS)
        stop = {free[0][0], free[1][-1]}
        stopped = continuations(served, [dataclasses.replace(r, stop=stop) for r in asked], most_rows=ROWS)
        expected = [row[: next((i for i, t in enumerate(row) if t in stop), None)] for row in free]
        assert stopped == expected
        assert stopped[0] == []

    def test_ends_when_told(self, params):
        asked = [Request(tokens=[1, 2], max_new_tokens=60, ended=lambda new: len(new) > 10)] * ROWS
        asked[2] = dataclasses.replace(asked[2], ended=None)
        found = continuations(Served(CONFIG, params), asked, most_rows=ROWS)
        assert found[0] == found[2][: len(found[0])]
        assert 10 < len(found[0]) <= 10 + generation.BLOCK
        assert len(found[2]) == 60

    def test_what_begins_alike_is_read_once(self, params, monkeypatch):
        counts, read = [], generation.steps.read

        def counted(config, params, past, streams, *rest, **options):
            counts.append(int(np.sum(streams.slots < past.slots)))
            return read(config, params, past, streams, *rest, **options)

        monkeypatch.setattr(generation.steps, "read", counted)
        shared = np.random.default_rng(0).integers(0, 96, 40).tolist()
        asked = [Request(tokens=[*shared, 3 * n, n], max_new_tokens=9) for n in range(9)]
        found = continuations(Served(CONFIG, params), asked, most_rows=ROWS)
        assert sum(counts) <= 42 + 8 * 3
        assert found == generate(CONFIG, params, [r.tokens for r in asked], max_new_tokens=9)

    def test_draws_depend_on_the_request_alone(self, params):
        asked = requests(prompts(), temperature=1.0, seed=3)
        found = continuations(Served(CONFIG, params), asked, most_rows=ROWS)
        others = continuations(Served(CONFIG, params), asked[4::-1], most_rows=ROWS)
        assert found[:5] == others[::-1]
        # and are those of the simple way, draw by draw
        whole = generate(
            CONFIG, params, [r.tokens for r in asked], max_new_tokens=24, temperature=1.0, seed=3
        )
        assert found == [row[: r.max_new_tokens] for row, r in zip(whole, asked, strict=True)]
        others = [dataclasses.replace(r, seed=4) for r in asked]
        assert continuations(Served(CONFIG, params), others, most_rows=ROWS) != found

    def test_each_request_has_its_own_settings(self, params):
        greedy, drawn = (requests(prompts(6), temperature=t)[:6] for t in (0.0, 1.0))
        narrow = [dataclasses.replace(r, top_k=1) for r in drawn]
        served = Served(CONFIG, params)
        mixed = [
            greedy[0],
            drawn[1],
            narrow[2],
            dataclasses.replace(drawn[3], top_p=1e-9),
            greedy[4],
            drawn[5],
        ]
        found, likeliest, free = (continuations(served, x, most_rows=ROWS) for x in (mixed, greedy, drawn))
        assert [found[i] for i in (0, 2, 3, 4)] == [likeliest[i] for i in (0, 2, 3, 4)]
        assert [found[i] for i in (1, 5)] == [free[i] for i in (1, 5)]

    @pytest.fixture
    def not_run(self, monkeypatch):
        """Batches without a model: each token is a 1."""
        steps = generation.steps

        def decode(config, params, past, rows, enough, *, steps, way):
            return past, np.ones((len(rows.last), steps)), np.minimum(rows.limit - rows.made, steps)

        monkeypatch.setattr(steps, "read", lambda *a, way: (None, np.ones(a[3].ends.size, np.int32)))
        monkeypatch.setattr(steps, "keep", lambda past, *_: past)
        monkeypatch.setattr(steps, "decode", decode)
        monkeypatch.setattr(steps, "copied", lambda past, *_: past)
        monkeypatch.setattr(steps, "moved", lambda past, rows, slots: init_past(CONFIG, len(rows), slots))

    def test_bounded_programs(self, params, not_run):
        programs, rng = set(), np.random.default_rng(0)
        shared = rng.integers(0, 96, 300).tolist()
        lengths = rng.integers(1, 200, (400, 3)).tolist()
        asked = [
            Request(tokens=[*shared[: s if s > 120 else 0], *[n % 96] * own], max_new_tokens=most)
            for n, (s, own, most) in enumerate(lengths)
            if s + own + most <= 512
        ]
        found = continuations(Served(CONFIG, params), asked, most_rows=16, programs=programs)
        assert [len(new) for new in found] == [r.max_new_tokens for r in asked]
        decoders = {used for used in programs if used[0] == "decode"}
        assert {slots for _, _, slots, *_ in decoders} == {64, 128, 256, 512}  # on from long ones to short
        assert {rows for _, rows, *_ in decoders} == {16, 4, 1}
        assert len(decoders) <= 6
        readers = {used for used in programs if used[0] == "read"}
        assert {slots for _, _, slots, *_ in readers} >= {0, 512}  # texts that begin, and what begins alike
        assert len(readers) <= 12  # of three sizes
        assert len(programs) <= 25

    def test_a_small_rest_of_the_prompts_waits_while_others_go_on(self, params, not_run, monkeypatch):
        counts, read = [], generation.steps.read

        def counted(*arguments, way):
            counts.append(int(np.sum(arguments[3].slots < 64)))
            return read(*arguments, way=way)

        monkeypatch.setattr(generation.steps, "read", counted)
        rng = np.random.default_rng(0)
        asked = [
            Request(tokens=rng.integers(0, 96, 20).tolist(), max_new_tokens=1 + 3 * n) for n in range(12)
        ]
        found = continuations(Served(CONFIG, params), asked, most_rows=8)
        assert [len(new) for new in found] == [r.max_new_tokens for r in asked]
        assert sum(counts) == 12 * 20
        assert min(counts[:-1]) >= 32  # half a piece; the last is what is left
        assert counts[0] == 128

    def test_memory_decides_how_many_run_at_once(self, params, not_run):
        served, programs = Served(CONFIG, params), set()
        asked = [Request(tokens=[n, 1], max_new_tokens=20) for n in range(9)]
        continuations(served, asked, memory=3 * slots_for(22) * served.slot_bytes, programs=programs)
        assert max(rows for _, rows, *_ in programs) == 3

    def test_layers_in_one_array(self, params, monkeypatch):
        """As they are held where slices are not copied."""
        asked = requests(prompts())
        expected = continuations(Served(CONFIG, params), asked, most_rows=ROWS)
        monkeypatch.setattr(Served, "by_layer", lambda served: served)
        assert continuations(Served(CONFIG, params), asked, most_rows=ROWS) == expected

    @pytest.mark.slow
    def test_bfloat16(self, params):
        half = {name: param.astype(jnp.bfloat16) for name, param in params.items()}
        served = Served(CONFIG, half)
        assert served.slot_bytes == Served(CONFIG, params).slot_bytes / 2
        asked = [Request(tokens=[5, 9, 2], max_new_tokens=8)]
        assert continuations(served, asked) == generate(CONFIG, half, [[5, 9, 2]], max_new_tokens=8)

    def test_parameters_that_are_not_finite(self, params):
        broken = params | {"model.norm.weight": params["model.norm.weight"].at[3].set(jnp.nan)}
        with pytest.raises(ValueError, match="logits are not finite for prompt 0"):
            continuations(Served(CONFIG, broken), [Request(tokens=[1], max_new_tokens=4)] * ROWS)

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens = 0: expected at least 1"),
            ({"temperature": -1.0}, "temperature = -1.0: expected 0 or more"),
            ({"top_k": -1}, "top_k = -1: expected 0 or more"),
            ({"top_p": 0.0}, "top_p = 0.0: expected more than 0"),
            ({"min_p": 1.5}, "min_p = 1.5: expected 0 to 1"),
            ({"seed": -1}, "seed = -1"),
            ({"tokens": []}, "prompt 0 has no tokens"),
            ({"tokens": [96]}, "prompt 0: token 96 is not in 0 to 95"),
            ({"tokens": [1] * 510}, "prompt 0 has 510 tokens: with max_new_tokens = 4 it does not fit"),
        ],
    )
    def test_refused(self, params, options, match):
        with pytest.raises(ValueError, match=match):
            continuations(
                Served(CONFIG, params), [Request(**{"tokens": [1], "max_new_tokens": 4, **options})]
            )


@pytest.fixture(scope="module")
def wide():
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=64)
    return Served(config, init_params(config, jax.random.key(0)))


class TestPrograms:
    """Neither the weights of a layer nor its cache are copied: a step would take twice as long."""

    ROWS, SLOTS = 8, 512

    def decoding(self, served):
        state = generation._Batch(served, [Request(tokens=[1], max_new_tokens=9)], [0], self.ROWS, set())
        state.rows[0] = generation._Row(0, [1], [2])
        program = generation.steps.decode.lower(
            *state.arguments,
            served.past(self.ROWS, self.SLOTS),
            state._state(),
            np.int32(self.ROWS),
            steps=generation.BLOCK,
            way="greedy",
        ).compile()
        return program.memory_analysis().temp_size_in_bytes

    def test_decode(self, wide):
        weight = wide.params["model.layers.mlp.up_proj.weight"][0].nbytes
        cache = self.ROWS * self.SLOTS * wide.slot_bytes // wide.config.num_layers // 2
        assert self.decoding(wide.by_layer()) < min(weight, cache) / 2
        assert self.decoding(wide) > max(weight, cache)  # what they are held by themselves for

    def test_quantized_weights_are_dequantized_one_layer_at_a_time(self, wide):
        config = dataclasses.replace(wide.config, num_layers=8)
        served = Served(config, init_params(config, jax.random.key(0), storage=NF4))
        weights = sum(served.params[name].size for name in ADAPTED) * 4
        assert self.decoding(served.by_layer()) < weights / 2

    def test_keep(self, wide):
        past, new = (wide.by_layer().past(rows, slots) for rows, slots in ((self.ROWS, self.SLOTS), (1, 64)))
        places = np.zeros((1, 64), np.int32)
        memory = generation.steps.keep.lower(past, new, places, places).compile().memory_analysis()
        assert memory.temp_size_in_bytes < past.keys.parts[0].nbytes / 2


def support(logits, draws=4000, **options):
    """What is drawn at all, with how often."""
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options
    full = {name: jnp.full(draws, value) for name, value in options.items()}
    choice = Choice(seed=jnp.zeros(draws, jnp.uint32), draw=jnp.arange(draws, dtype=jnp.uint32), **full)
    rows = jnp.broadcast_to(logits, (draws, logits.size))
    drawn = jax.jit(choose, static_argnames="way")(rows, choice, jnp.zeros(draws, jnp.int32), way="filtered")
    return np.bincount(np.asarray(drawn), minlength=logits.size) / draws


class TestChoose:
    @pytest.mark.parametrize(
        "options",
        [
            {"top_k": 2},
            {"top_p": 0.75},
            {"top_p": 0.6},
            {"min_p": 0.6},
            {"top_k": 3, "top_p": 0.7},
            {"temperature": 2.0, "top_p": 0.75},
            {"temperature": 0.5, "min_p": 0.2, "top_k": 3},
        ],
        ids=str,
    )
    def test_frequencies_are_those_of_transformers(self, options):
        from transformers.generation import logits_process as theirs

        logits = np.log([0.1, 0.2, 0.3, 0.4]).astype(np.float32) + 5
        scores = torch.tensor(logits)[None]
        for name, process in (
            ("temperature", theirs.TemperatureLogitsWarper),
            ("top_k", theirs.TopKLogitsWarper),
            ("top_p", theirs.TopPLogitsWarper),
            ("min_p", theirs.MinPLogitsWarper),
        ):
            if name in options:
                scores = process(options[name])(None, scores)
        expected = torch.softmax(scores, -1)[0].numpy()
        found = support(jnp.array(logits), **options)
        np.testing.assert_allclose(found, expected, atol=0.03)
        assert not found[expected == 0].any()
