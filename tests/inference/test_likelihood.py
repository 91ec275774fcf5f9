import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.decoders import CONFIG, MIXED, WINDOW

from spiel_jax.inference import likelihood
from spiel_jax.inference.likelihood import likelihoods, token_likelihoods
from spiel_jax.inference.served import Served, rows_for, slots_for
from spiel_jax.inference.tree import lay_out
from spiel_jax.models import bind, init_params


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0))


def a_family(rng, count=40, longest=90):
    """Sequences that share beginnings of all lengths, some of them equal, some others' beginnings."""
    family = [rng.integers(0, 96, 5).tolist()]
    for _ in range(count - 2):
        parent = family[rng.integers(len(family))]
        own = rng.integers(0, 96, rng.integers(1, longest)).tolist()
        family.append([*(parent[: rng.integers(0, len(parent) + 1)] + own)[: 3 * longest], 7])
    return [*family, family[-1]]


def plainly(config, params, sequences, first):
    """Each sequence through the model by itself."""
    found = []
    forward = jax.jit(lambda tokens: jax.nn.log_softmax(bind(config, params)(tokens, remat="none")))
    for tokens, start in zip(sequences, first, strict=True):
        padded = np.zeros((1, 320), np.int32)
        padded[0, : len(tokens)] = tokens
        table = np.asarray(forward(padded))[0]
        places = np.arange(start, len(tokens))
        chosen = table[places - 1, np.array(tokens)[places]]
        found.append((chosen, table[places - 1].argmax(-1) == np.array(tokens)[places]))
    return found


class TestTree:
    @pytest.mark.parametrize("size", [1, 4, 16, 1000])
    def test_every_token_sees_its_own_beginning_and_nothing_else(self, size):
        rng = np.random.default_rng(size)
        sequences = a_family(rng)
        first = [int(rng.integers(1, len(tokens))) for tokens in sequences]
        pieces = lay_out(sequences, first, size)
        slots = {}
        answers = {number: [] for number in range(len(sequences))}
        for piece in pieces:
            seen = []
            for place in range(piece.used):
                past = [slots[slot] for slot in range(piece.reach[place])]
                own = [piece.tokens[k] for k in range(place + 1) if k <= place < piece.until[k]]
                assert len(past) + len(own) - 1 == piece.positions[place]
                seen.append([*map(int, past + own)])
            for place, target, number in piece.asked:
                answers[number].append((seen[place], target))
            for place in np.flatnonzero(piece.keep):
                slots[int(piece.positions[place])] = piece.tokens[place]
        for number, (tokens, start) in enumerate(zip(sequences, first, strict=True)):
            expected = [(tokens[:place], tokens[place]) for place in range(start, len(tokens))]
            assert answers[number] == expected

    def test_what_is_shared_is_there_once(self):
        shared = list(range(50))
        sequences = [[*shared, 60 + number, 1, 2] for number in range(10)]
        pieces = lay_out(sequences, [51] * 10, 8)
        assert sum(piece.used for piece in pieces) == 50 + 10 * 2


class TestLikelihoods:
    @pytest.mark.parametrize(
        "config",
        [pytest.param(config, marks=pytest.mark.slow) for config in (CONFIG, WINDOW)] + [MIXED],
        ids=["full", "window", "mixed"],
    )
    def test_equal_the_model_on_each_sequence_alone(self, params, config, monkeypatch):
        monkeypatch.setitem(likelihood._PIECE, "cpu", 48)
        rng = np.random.default_rng(0)
        sequences = a_family(rng)
        first = [int(rng.integers(1, len(tokens))) for tokens in sequences]
        expected = plainly(config, params, sequences, first)
        # the model's own choices, so that some are greedy
        found = token_likelihoods(Served(config, params), sequences, first)
        for (values, greedy), (wanted, likeliest) in zip(found, expected, strict=True):
            np.testing.assert_allclose(values, wanted, atol=2e-5, rtol=2e-5)
            assert greedy.tolist() == likeliest.tolist()
        summed = likelihoods(Served(config, params), sequences, first)
        assert [x.log_probability for x in summed] == [float(values.sum()) for values, _ in found]

    def test_greedy(self, params):
        prompt = [5, 9, 2]
        table = bind(CONFIG, params)(jnp.array([prompt]), remat="none")[0]
        best = int(table[-1].argmax())
        one, other = likelihoods(
            Served(CONFIG, params), [[*prompt, best], [*prompt, (best + 1) % 96]], [3, 3]
        )
        assert one.greedy
        assert not other.greedy
        assert one.log_probability > other.log_probability

    def test_few_programs(self, params):
        programs = set()
        rng = np.random.default_rng(1)
        sequences = [rng.integers(0, 96, length).tolist() for length in range(2, 240, 7)]
        likelihoods(Served(CONFIG, params), sequences, [1] * len(sequences), programs=programs)
        assert {slots for kind, *_, slots in programs if kind == "read"} <= {64, 128, 256}

    def test_none(self, params):
        assert likelihoods(Served(CONFIG, params), [], []) == []

    @pytest.mark.parametrize(
        ("tokens", "start", "match"),
        [
            ([1, 2], 2, "text 0 of 2 tokens, its continuation from token 2"),
            ([1, 2], 0, "context and continuation need at least one each"),
            ([1, 96], 1, "text 0 has a token that is not in 0 to 95"),
        ],
    )
    def test_refused(self, params, tokens, start, match):
        with pytest.raises(ValueError, match=match):
            likelihoods(Served(CONFIG, params), [tokens], [start])

    def test_parameters_that_are_not_finite(self, params):
        broken = params | {"model.norm.weight": params["model.norm.weight"].at[3].set(jnp.nan)}
        with pytest.raises(ValueError, match="logits are not finite for text 0"):
            likelihoods(Served(CONFIG, broken), [[1, 2]], [1])


class TestMemory:
    def test_rows(self, params):
        served = Served(CONFIG, params)
        assert served.slot_bytes == 2 * 2 * 2 * 8 * 4
        row = slots_for(100) * served.slot_bytes
        assert rows_for(served, 100, 5 * row, 64) == 5
        assert rows_for(served, 100, 5 * row, 3) == 3

    def test_not_even_one(self, params):
        with pytest.raises(ValueError, match=r"a text of 100 tokens takes .* allow more memory"):
            rows_for(Served(CONFIG, params), 100, 1000, 64)
