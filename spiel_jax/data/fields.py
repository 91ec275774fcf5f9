"""Fields of rows and turns: found, read with their types checked, and what becomes of those nobody reads.

A field that is null (or NaN, which pandas writes for it) is an absent one.
"""

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

# Where a row comes from and how it was judged: nothing to learn, and nothing that changes what is.
_NOTES = """
id ids idx index uid uuid guid hash key sha sha1 sha256 md5 row row_number __index_level_0__
source sources src dataset datasets dataset_name origin provenance corpus subset subset_name split
url urls link doi license licence copyright author authors annotator annotators worker user_id username
hashed_ip header ip country state city region
category categories subcategory topic topics domain domains subject subjects field tag tags keyword keywords
task tasks task_name type kind level difficulty complexity
score scores quality rating ratings rank ranks votes upvotes downvotes likes reward rewards confidence
perplexity ppl similarity toxic toxicity redacted moderation openai_moderation detoxify_moderation moderated
flagged verified reviewed review_state
lang langs language languages language_code locale script
time timestamp timestamps date datetime created created_utc updated modified year
length lengths len size tokens chars words turn
model models model_name engine generator teacher provider temperature top_p max_tokens seed usage
finish_reason stop_reason logprobs latency cost
version revision batch epoch fold meta metadata _meta
embedding embeddings vector annotations cache_control parallel_tool_calls
"""
_NOTE_ENDINGS = """
_id _ids _idx _index _hash _url _source _model _type _tag _tags _split _score _scores _rating _tokens _count
_length _len _at _time _date _timestamp _language _lang _license _category _metadata _version
"""
_IS_NOTE = frozenset(_NOTES.split())
_ENDS_NOTE = tuple(_NOTE_ENDINGS.split())
_BEGINS_NOTE = ("num_", "n_", "score_", "Unnamed: ")

_MORE_THAN_TEXT = "image images audio audios video videos input_audio"
_MASKS = """
train_detail training_detail loss_mask loss_weight loss_scale mask masks masked labels label_mask
completion_mask assistant_mask assistant_masks
"""
_RENDERING = "chat_template chat_template_kwargs add_generation_prompt continue_final_message"
_REFUSED = {
    **dict.fromkeys(
        _MORE_THAN_TEXT.split(), "is more than text, and only text is learnt: remove it, or the row"
    ),
    **dict.fromkeys(
        _MASKS.split(),
        "says what to learn in a way that is not known: mark turns by weight: 0 or train: false",
    ),
    **dict.fromkeys(
        _RENDERING.split(),
        "says how the template is to be used, which is the same for all rows here: remove it",
    ),
}


def present(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are there."""
    return {key: value for key, value in fields.items() if value is not None and value == value}


def without_nulls(value: Any) -> Any:
    """The same without fields that are absent, however deep."""
    if isinstance(value, Mapping):
        return {key: without_nulls(one) for key, one in present(value).items()}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def spelt(fields: Mapping[str, Any], known: frozenset[str]) -> dict[str, str]:
    """How a row or turn writes keys that are known, where it writes them otherwise: ``Instruction``.

    Capitals, spaces, hyphens and underscores make no difference. Where several keys could be meant, or the
    known one is there too, none is.

    >>> spelt({"Prompt": "a", "System Prompt": "b"}, frozenset(("prompt", "system_prompt")))
    {'prompt': 'Prompt', 'system_prompt': 'System Prompt'}
    """
    if fields.keys() <= known:
        return {}
    names, found = _by_letters(known), dict[str, list[str]]()
    for key in fields:
        if key not in known and isinstance(key, str) and (name := names.get(_letters(key))):
            found.setdefault(name, []).append(key)
    return {
        name: key
        for name, (key, *more) in found.items()
        # a column "Weight" may hold anything
        if not more and name not in fields and (name not in FLAGS or _is_yes_or_no(fields[key]))
    }


def at(fields: Mapping[str, Any], path: str) -> Any:
    """What is at a path, such as ``data.question`` or ``answers.text.0``; None if nothing is.

    >>> at({"data": {"question": "a"}, "a.b": "c"}, "data.question"), at({"a.b": "c"}, "a.b")
    ('a', 'c')
    """
    if path in fields:
        return fields[path]
    value: Any = fields
    for step in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def beside(fields: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """The fields that no path leads to; those of an object into which one leads, by their own paths.

    >>> beside({"data": {"question": "a", "mood": "b"}, "more": "c"}, ["data.question"])
    {'data.mood': 'b', 'more': 'c'}
    """
    found = {}
    for key, value in fields.items():
        inside = [path for path in paths if path.startswith(f"{key}.") and path not in fields]
        if key in paths:
            continue
        if not inside:
            found[key] = value
        elif isinstance(value, Mapping) and not is_note(key):
            steps = [path.removeprefix(f"{key}.") for path in inside]
            rest = beside(present(value), steps)
            found |= {
                f"{key}.{step}": one for step, one in rest.items() if not is_note(step.rpartition(".")[2])
            }
    return found


@functools.lru_cache(maxsize=4096)
def _letters(key: str) -> str:
    return re.sub(r"[\s_-]", "", key).lower()


@functools.cache
def _by_letters(known: frozenset[str]) -> dict[str, str]:
    return {_letters(name): name for name in known}


@functools.lru_cache(maxsize=4096)
def is_note(key: Any) -> bool:
    """Whether a field says where its row comes from or how it was judged, which is nothing to learn."""
    return isinstance(key, str) and (
        not key or key.lower() in _IS_NOTE or key.endswith(_ENDS_NOTE) or key.startswith(_BEGINS_NOTE)
    )


def unread(fields: Mapping[str, Any], known: Collection[str], said: Collection[str]) -> Iterator[str]:
    """The keys of fields that hold something which nobody reads.

    Args:
      fields: a row or a turn.
      known: the keys that are read.
      said: texts of the example, which a field may repeat.

    Raises:
      ValueError: a field changes what is to be learnt, and it is not known how.
    """
    for key, value in fields.items():
        if key in known:
            continue
        if not isinstance(key, str):
            raise ValueError(f"a key must be a string, not {key!r}")
        if value is None or value != value or (value in ("", [], {}) and value is not False):
            continue
        if key == "labels" and _are_names(value):
            continue
        if key in _REFUSED:
            raise ValueError(f"{key!r} {_REFUSED[key]}")
        if key in ("label", "kto_tag") and isinstance(value, bool):
            if not value:
                raise ValueError(
                    f"{key!r} is false: the row says what not to answer, and learning from that is not "
                    "supported; remove such rows, or skip malformed ones"
                )
            continue
        if is_note(key):
            continue
        if isinstance(value, str) and any(value.strip() == text.strip() for text in said):
            continue
        yield key


def _are_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def string(fields: Mapping[str, Any], key: str) -> str:
    """A field that must be a string."""
    if key not in fields:
        raise ValueError(f"no key {key!r} among {names(fields)}")
    value = fields[key]
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a string, not {kind(value)}")
    return value


def text(fields: Mapping[str, Any], key: str) -> str:
    """A field that must be a string with something in it."""
    value = string(fields, key)
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    return value


def flag(fields: Mapping[str, Any]) -> bool:
    """Whether a row or turn is to be learnt, as far as it says so itself.

    Raises:
      ValueError: it has a weight between or beyond yes and no.
    """
    learn = True
    for key in FLAGS & fields.keys():
        value = fields[key]
        if not _is_yes_or_no(value):
            raise ValueError(
                f"{key!r} must be 0 or 1 (false or true), not {value!r}: a turn is learnt or it is not"
            )
        learn = learn and bool(value)
    return learn


def _is_yes_or_no(value: object) -> bool:
    return isinstance(value, bool | int | float) and value in (0, 1)


FLAGS = frozenset(("weight", "train", "trainable", "loss"))
"""Keys by which OpenAI, mistral-finetune, SlimOrca, axolotl and ms-swift mark what is not to be learnt."""


def names(fields: Mapping[str, Any]) -> str:
    """Its keys, for a message."""
    return ", ".join(repr(key) for key in fields) or "none"


def kind(value: object) -> str:
    """What a value is, for a message."""
    return "null" if value is None else type(value).__name__
