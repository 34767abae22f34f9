"""How a model that answers in words is made to answer."""

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from sft_jax.config.section import NotNegative, Positive, Section, Seed


class Generation(Section):
    """How answers are written, token by token: the likeliest each time, drawn, or the likeliest of several beams."""

    max_new_tokens: Positive = 64
    """Tokens of an answer at most."""
    temperature: NotNegative = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, the more evenly the higher it is."""
    top_k: Positive | None = None
    """Draw among so many of the likeliest tokens."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the likeliest tokens that have this probability together."""
    num_beams: Positive = 1
    """Answers that are gone on with side by side, of which the likeliest is taken."""
    length_penalty: float = 1.0
    """Exponent of the length that the score of a beam is divided by; above 0 favours long answers."""
    early_stopping: bool | Literal["never"] = False
    """`true` stops when there are as many whole answers as beams, `false` when better ones are unlikely, `never` when
    they are impossible."""
    seed: Seed = 0
    """Of the tokens that are drawn."""

    @model_validator(mode="after")
    def _draws_or_searches(self) -> Self:
        if self.num_beams > 1 and self.temperature:
            raise ValueError("num_beams: beams are searched and not drawn; set temperature to 0, or num_beams to 1")
        if not self.temperature and (self.top_k is not None or self.top_p < 1):
            raise ValueError("temperature: at 0 nothing is drawn, so top_k and top_p do nothing; raise it")
        return self


@dataclass(frozen=True)
class Rules:
    """What the files of a model say of every answer: which tokens may stand where."""

    banned: tuple[int, ...] = ()  # tokens that are never said
    first: int | None = None  # what an answer begins with
    last: int | None = None  # what an answer ends with that is as long as it may be
    least: int = 0  # tokens before an answer may end


ANYTHING = Rules()
