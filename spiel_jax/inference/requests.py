"""What is asked of a model that continues texts."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from spiel_jax.errors import SpielError
from spiel_jax.models import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to continue, and how.

    Attributes:
        tokens: The text, as token ids.
        max_new_tokens: New tokens, at most.
        temperature: 0 takes the likeliest token; otherwise tokens are drawn with the probabilities of the
            logits divided by it.
        top_k: Draw among so many of the likeliest tokens; 0 for all.
        top_p: Draw among the likeliest tokens that together have this probability (arXiv 1904.09751).
        min_p: Draw among the tokens at least so many times as likely as the likeliest (arXiv 2407.01082).
        seed: Of the draws.
        draw: Which of several continuations with one seed; they are drawn independently.
        stop: Tokens that end the continuation, and are left out.
        ended: Asked of the new tokens, now and then, whether that is enough; None: it never is. Where stops
            are texts, it looks for them.

    Example:
        >>> Request(tokens=[1, 2, 3], max_new_tokens=8, temperature=0.7, top_p=0.9).greedy
        False
    """

    tokens: Sequence[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    draw: int = 0
    stop: Collection[int] = ()
    ended: Callable[[Sequence[int]], bool] | None = None

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    @property
    def length(self) -> int:
        """Of the text with all that may be added."""
        return len(self.tokens) + self.max_new_tokens

    def check(self, config: ModelConfig, number: int) -> None:
        """Makes sure that a model can do it.

        Args:
            config: The model's shape.
            number: The request's, for the message.

        Raises:
            SpielError: If a setting or a token is not allowed, or the text does not fit the model.
        """
        for name, fine, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "0 to 1"),
            ("seed", 0 <= self.seed < 2**32, "0 to 2**32 - 1"),
        ):
            if not fine:
                raise SpielError(f"{name} = {getattr(self, name)}: expected {allowed}")
        if not self.tokens:
            raise SpielError(f"prompt {number} has no tokens")
        if unknown := [token for token in self.tokens if not 0 <= token < config.vocab_size]:
            raise SpielError(f"prompt {number}: token {unknown[0]} is not in 0 to {config.vocab_size - 1}")
        if self.length > config.max_positions:
            raise SpielError(
                f"prompt {number} has {len(self.tokens)} tokens: with max_new_tokens = {self.max_new_tokens} "
                f"it does not fit the model's {config.max_positions} positions"
            )
