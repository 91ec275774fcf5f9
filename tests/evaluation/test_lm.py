"""Ours beside lm-eval's own model, on the same weights."""

import random

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from spiel_jax.errors import SpielError
from spiel_jax.evaluation import lm
from spiel_jax.evaluation.lm import SpielLM

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # lm-eval leaves files open
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=number) for number, one in enumerate(arguments)
    ]


def texts(count, longest, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices("abc de.\n", k=draw.randrange(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def models(llama_folder):
    from lm_eval.models.huggingface import HFLM

    ours = SpielLM(model=str(llama_folder), dtype="float32", progress=False)
    theirs = HFLM(pretrained=str(llama_folder), dtype="float32", batch_size=4, device="cpu")
    assert ours.max_length == theirs.max_length
    return ours, theirs


def test_is_registered_beside_the_harness_own():
    assert get_model("spiel_jax") is SpielLM
    assert get_model("hf").__name__ == "HFLM"


class TestScoring:
    def test_log_likelihoods(self, models):
        pairs = [
            (context, continuation)
            for context in ["", "a ", *texts(4, 60), *texts(2, 400)]
            for continuation in (" a", "b", " Longer text.")
        ]
        found, expected = (
            one.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for one in models
        )
        for mine, right in zip(found, expected, strict=True):
            assert mine[0] == pytest.approx(right[0], abs=1e-3)
            assert mine[1] == right[1]

    def test_rolling(self, models):
        long = instances("loglikelihood_rolling", [(text,) for text in [*texts(2, 900), "x"]])
        found, expected = (one.loglikelihood_rolling(long, disable_tqdm=True) for one in models)
        assert found == pytest.approx(expected, rel=1e-5)

    @pytest.mark.parametrize("until", [["a"], ["\n\n", ". "], [], "b"])
    def test_greedy_texts(self, models, until):
        asked = [
            (text, {"until": until, "max_gen_toks": limit, "do_sample": False})
            for text, limit in zip(texts(7, 300, seed=1), (1, 5, 9, 17, 24, 9, 9), strict=True)
        ]
        found, expected = (
            one.generate_until(instances("generate_until", asked), disable_tqdm=True) for one in models
        )
        assert found == expected

    def test_chat_template(self, models):
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        ours, theirs = models
        for add in (True, False):
            shown = turns[: 1 if add else 2]
            assert ours.apply_chat_template(shown, add) == theirs.apply_chat_template(shown, add)

    def test_draws_differ_from_repeat_to_repeat_but_not_from_run_to_run(self, models, monkeypatch):
        ours, _ = models
        given = []
        monkeypatch.setattr(lm, "continuations", lambda served, asked, **_: given.append(asked))
        options = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
        asked = instances("generate_until", [*[("abc", options)] * 3, ("cab", options)])
        ours.generate_until(asked)
        ours.generate_until([asked[3], asked[0]])
        assert len({request.draw for request in given[0]}) == 4
        assert [request.draw for request in given[1]] == [given[0][3].draw, given[0][0].draw]
        assert {(request.temperature, request.top_p) for request in given[0]} == {(1.0, 0.9)}

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"repetition_penalty": 2.0}, "generation_kwargs repetition_penalty: not known here"),
            ({"max_gen_toks": 100_000}, "leaves no room"),
        ],
    )
    def test_refused(self, models, options, match):
        with pytest.raises(SpielError, match=match):
            models[0].generate_until(instances("generate_until", [("a", {"until": [], **options})]))
