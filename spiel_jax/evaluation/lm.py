"""Models of this library as lm-eval knows models: ``spiel_jax`` in its registry.

What a text is as tokens, where it is cut and where it ends is as in lm-eval's own model ``hf``, so that
scores are the same; only how the model is run is ours.
"""

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import lm_eval.models  # noqa: F401  (the registry must have the harness's own models before it has ours)
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs

from spiel_jax.data import chat_template as template_of
from spiel_jax.errors import SpielError
from spiel_jax.inference.generation import continuations
from spiel_jax.inference.likelihood import Likelihood, likelihoods
from spiel_jax.inference.requests import Request
from spiel_jax.inference.served import Served
from spiel_jax.inference.texts import before_stops, stops_at

MAX_NEW_TOKENS = 256
"""Of a continuation where a task does not say."""

_SETTINGS = ("temperature", "top_k", "top_p", "min_p", "seed")
_IGNORED = ("do_sample", "use_cache", "num_beams")


class SpielLM(TemplateLM):
    """A model to evaluate.

    lm-eval's own command line makes it from ``--model_args``: ``checkpoint=RUN`` or ``model=SOURCE``, and
    what else is named below.

    Args:
        served: A model at hand; None: it is loaded.
        tokenizer: Its tokenizer; to load: where that is, if not with the model.
        checkpoint: The folder of a run, to load the tuned model of.
        model: A model to load (see ``open_model``); with ``checkpoint``, where its base is now.
        step: Of the checkpoint.
        dtype: To load a model in.
        unmerged: Whether quantised weights of a run stay so, see ``load_run``.
        name: Of the tokenizer, for lm-eval's cache of requests.
        max_length: Tokens of context and continuation; None: the model's positions.
        prefix_token_id: Before texts without a context; None: BOS, else EOS.
        add_bos_token: Whether BOS is added to texts; None: as the tokenizer does.
        memory: Bytes of the key-value cache; None: most of what is free.
        progress: Whether to show progress bars.
        batch_size: What lm-eval passes, and the three after it: the memory decides.
        max_batch_size: See there.
        device: See there.

    Raises:
        SpielError: If the model cannot be loaded.

    Example:
        ``lm_eval.simple_evaluate(SpielLM(checkpoint="runs/smollm2"), tasks=["gsm8k"])``
    """

    def __init__(
        self,
        served: Served | None = None,
        tokenizer: Any = None,
        *,
        checkpoint: str | None = None,
        model: str | None = None,
        step: int | str | None = None,
        dtype: str = "bfloat16",
        unmerged: bool = False,
        name: str | None = None,
        max_length: int | None = None,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        memory: int | None = None,
        progress: bool = True,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        del batch_size, max_batch_size, device
        if served is None:
            served, tokenizer = load(checkpoint, model, tokenizer, step=step, dtype=dtype, unmerged=unmerged)
        self.served, self.tokenizer = served, tokenizer
        self.add_bos_token, self.memory, self.progress = add_bos_token, memory, progress
        self.programs: set[tuple] = set()
        self._name = name or f"{checkpoint or model or 'served'}"
        self._max_length, self._prefix = max_length, prefix_token_id

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context follows."""
        if self._prefix is not None:
            return self._prefix
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self._max_length or self.served.config.max_positions

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return MAX_NEW_TOKENS

    @property
    def batch_size(self) -> str:
        """For lm-eval's notes only: the cache's memory decides."""
        return "auto"

    @property
    def tokenizer_name(self) -> str:
        """Part of the key of lm-eval's cache of requests."""
        return (self.tokenizer.name_or_path or self._name).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a BOS that the text has already is not added."""
        del kwargs
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        elif add_special_tokens is None:
            add_special_tokens = self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as the tokenizer's template writes it; without its system message if it refuses."""
        import jinja2

        def written(turns: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                turns,
                tokenize=False,
                chat_template=template_of(self.tokenizer),
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )

        try:
            return written(chat_history)
        except jinja2.exceptions.TemplateError:
            return written([turn for turn in chat_history if turn["role"] != "system"])

    def chat_template(self, chat_template: bool | str = False) -> str | None:  # noqa: D102
        return None if chat_template is False else template_of(self.tokenizer)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        del kwargs  # batch sizes
        whole, first = [], []
        for _key, context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise SpielError(
                    f"a context of {len(context)} tokens and a continuation of {len(continuation)}: both "
                    f"need one at least, and the continuation must fit {self.max_length} positions"
                )
            kept = (context + continuation)[-(self.max_length + 1) :]
            whole.append(kept)
            first.append(len(kept) - len(continuation))

        def done(number: int, found: Likelihood) -> None:
            key = requests[number][0]
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, (found.log_probability, found.greedy))

        found = likelihoods(
            self.served,
            whole,
            first,
            memory=self.memory,
            progress=self.progress and not disable_tqdm,
            programs=self.programs,
            done=done,
        )
        return [(one.log_probability, one.greedy) for one in found]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, in windows of the longest context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, found, strict=True):
            totals[owner] += log_probability
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, up to the first of their stops."""
        asked, stops = [], []
        seen: Counter[str] = Counter()
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for request in requests:
            context, options = request.args
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(options, self.max_gen_toks))
            until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
            asked.append(self._request(context, kwargs, until, seen[repr(request.args)]))
            seen[repr(request.args)] += 1
            stops.append(until)
        texts = [""] * len(requests)

        def done(number: int, new: list[int]) -> None:
            texts[number] = before_stops(self.tok_decode(new), stops[number])
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])

        continuations(
            self.served,
            asked,
            memory=self.memory,
            progress=self.progress and not disable_tqdm,
            programs=self.programs,
            done=done,
        )
        return texts

    def _request(self, context: str, kwargs: Mapping[str, Any], until: Sequence[str], repeat: int) -> Request:
        """What a task asks for.

        Args:
            context: The prompt.
            kwargs: From ``normalize_gen_kwargs``.
            until: Texts that end it.
            repeat: How often the same was asked for before.
        """
        known = (*_SETTINGS, *_IGNORED, "max_gen_toks")
        if unknown := sorted(name for name in kwargs if name not in known and kwargs[name] is not None):
            raise SpielError(
                f"generation_kwargs {', '.join(unknown)}: not known here; there are until, max_gen_toks, "
                f"do_sample, {', '.join(_SETTINGS)}"
            )
        count = kwargs["max_gen_toks"]
        room = self.max_length - count
        if room < 1:
            raise SpielError(f"max_gen_toks = {count} leaves no room in {self.max_length} positions")
        settings = {name: kwargs[name] for name in _SETTINGS if kwargs.get(name) is not None}
        return Request(
            tokens=self.tok_encode(context)[-room:],
            max_new_tokens=count,
            # the same for a prompt wherever it stands, and another for each repetition
            draw=(zlib.crc32(context.encode()) + repeat) % 2**32,
            stop={self.eot_token_id},
            ended=stops_at(self.tokenizer, until),
            **settings,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes of a model beside its scores."""
        params = self.served.params.values()
        size = sum(param.size for param in params)
        return {"model_num_parameters": size, "model_dtype": str(self.served.dtype)}


register_model("spiel_jax")(SpielLM)  # as a decorator it would hide what the class is


def load(
    checkpoint: str | None,
    model: str | None,
    tokenizer: str | None = None,
    *,
    step: Any = None,
    dtype: str = "bfloat16",
    unmerged: bool = False,
) -> tuple[Served, Any]:
    """A model to evaluate, and its tokenizer; see ``SpielLM``.

    Raises:
        SpielError: If neither a checkpoint nor a model is named, or it cannot be loaded.
    """
    if checkpoint is not None:
        from spiel_jax.adapters.load import load_run

        run = load_run(checkpoint, step, model=model, tokenizer=tokenizer, unmerged=unmerged)
        return Served(run.config, run.tuned), run.tokenizer
    if model is None:
        raise SpielError("give checkpoint=DIR (a run's folder) or model=SOURCE")
    from spiel_jax.models.io.loading import open_model
    from spiel_jax.models.io.tokenizer_places import open_tokenizer

    source = open_model(model)
    read = source.tokenizer() if tokenizer is None else open_tokenizer(tokenizer)
    return Served(source.config, source.load(dtype, progress=False)), read
