"""What is learned from the rows: a section for each task, told apart by `kind`."""

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sft_jax.config.generation import Generation
from sft_jax.config.section import NotNegative, Positive, Section, Share


class Texts(Section):
    """The columns of one or two texts, which every task on sequences begins with."""

    text: str = "text"
    """Column that holds the text."""
    text_pair: str | None = None
    """Column that holds a second text (premise and hypothesis, question and passage)."""


class SequenceClassification(Texts):
    """One label for each row of one or two texts."""

    kind: Literal["sequence_classification"]
    label: str = "label"
    """Column that holds the label: a name, or a number from 0."""
    labels: list[str] | None = None
    """Names of the labels in the order of their numbers; null takes them from the source or the sorted values."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal` weighs rows down that are already right."""
    focal_gamma: NotNegative = 2.0
    """How steeply `focal` weighs down; 0 is cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over all labels."""
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = None
    """Weight of each label's rows in the loss: by name (1 where not named), or inverse to how often it occurs."""


class MultiLabelClassification(Texts):
    """Any number of labels for each row of one or two texts."""

    kind: Literal["multi_label_classification"]
    label: str | list[str] = "labels"
    """Column that holds the labels, a list or a text joined by `separator`; or several columns of 0 and 1."""
    separator: str = ","
    """What joins the labels of a row where they are one text."""
    labels: list[str] | None = None
    """Names of the labels in the order of their numbers; null takes the column names or the sorted values."""
    threshold: Share = 0.5
    """Probability from which on a label is predicted."""
    loss: Literal["binary_cross_entropy", "focal"] = "binary_cross_entropy"
    """`focal` weighs labels down that are already right."""
    focal_gamma: NotNegative = 2.0
    """How steeply `focal` weighs down; 0 is binary cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is moved to one half."""
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = None
    """Weight of each label's positive rows in the loss: by name (1 where not named), or negatives over positives."""


class Regression(Texts):
    """A number for each row of one or two texts."""

    kind: Literal["regression"]
    label: str = "score"
    """Column that holds the number."""
    loss: Literal["squared", "huber"] = "squared"
    """`huber` is squared near 0 and linear beyond, so that outliers count for less."""
    huber_delta: Annotated[float, Field(gt=0)] = 1.0
    """Where `huber` turns linear."""


class TokenClassification(Section):
    """A tag for each word of each row: named entities, parts of speech."""

    kind: Literal["token_classification"]
    words: str = "tokens"
    """Column that holds the words, a list; a text is split at white space."""
    tags: str = "tags"
    """Column that holds the tags, a list with a name, or a number from 0, for each word."""
    spans: str | None = None
    """Column that holds spans of the characters of `text`, in place of `words` and `tags`: each `[begin, end, label]`,
    or an object with `start`, `end` and `label`; words are runs of letters and digits, and each other sign."""
    text: str = "text"
    """Column that holds the text that `spans` are of."""
    labels: list[str] | None = None
    """Names of the tags in the order of their numbers; null takes them from the source or the sorted values."""
    scheme: Literal["auto", "BIO", "BIOES", "IO", "none"] = "auto"
    """How tags mean spans; `none` for tags that do not, such as parts of speech; `auto` tells by their names."""
    align: Literal["first", "all", "average"] = "first"
    """Which tokens of a word are trained on and read: its first one; all, of which the first is read (after a B- the
    others are I-); or the mean of the outputs of all."""
    stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens by which the windows of a row that is longer than `data.max_length` overlap; null: a quarter of it."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal` weighs words down that are already right."""
    focal_gamma: NotNegative = 2.0
    """How steeply `focal` weighs down; 0 is cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over all tags."""
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = None
    """Weight of each tag's words in the loss: by name (1 where not named), or inverse to how often it occurs."""


class QuestionAnswering(Section):
    """The span of a context that answers a question."""

    kind: Literal["question_answering"]
    question: str = "question"
    """Column that holds the question."""
    context: str = "context"
    """Column that holds the text with the answer."""
    answers: str = "answers"
    """Column that holds the right answers as in SQuAD, with `text` and `answer_start`; the first one is learned."""
    answer_text: str | None = None
    """Column that holds the answer as a text, in place of `answers`; it must stand in the context exactly once."""
    no_answer: bool = False
    """Whether rows may be without an answer, and predictions too."""
    null_threshold: float = 0.0
    """By how much "no answer" must score above the best span to be said."""
    stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens by which windows of a context that is longer than `data.max_length` overlap; null: a quarter of it."""
    n_best: Annotated[int, Field(ge=1)] = 20
    """Answers that are kept of each row; the score of one is its probability among them."""
    max_answer_tokens: Annotated[int, Field(ge=1)] = 30
    """Tokens that a predicted answer may have."""


class ImageClassification(Section):
    """One label for each image."""

    kind: Literal["image_classification"]
    image: str = "image"
    """Column that holds the image: encoded, or the path of its file."""
    label: str = "label"
    """Column that holds the label: a name, or a number from 0."""
    labels: list[str] | None = None
    """Names of the labels in the order of their numbers; null takes them from the source or the sorted values."""
    size: Positive | None = None
    """Height and width that the model reads, in place of those of its `preprocessor_config.json`; exported so."""
    whole: bool = False
    """With a `size`: nothing is cut off around the middle of square images, even where the processor would."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """`focal` weighs rows down that are already right."""
    focal_gamma: NotNegative = 2.0
    """How steeply `focal` weighs down; 0 is cross-entropy."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over all labels."""
    class_weights: Literal["balanced"] | dict[str, NotNegative] | None = None
    """Weight of each label's rows in the loss: by name (1 where not named), or inverse to how often it occurs."""

    @model_validator(mode="after")
    def _whole_of_a_size(self) -> Self:
        if self.whole and self.size is None:
            raise ValueError("whole: is of images of a size of your own; give size, or leave whole out")
        return self


class CausalLM(Section):
    """The next token of each text, of answers to prompts, or of what an assistant says in conversations."""

    kind: Literal["causal_lm"]
    format: Literal["auto", "text", "completion", "chat", "tokens", "segments"] = "auto"
    """Texts as they are, a prompt with its completion, messages by the chat template of the tokenizer, tokens by their
    numbers, or a text in segments that are learned or not; `auto` tells by the columns, and what it tells is said."""
    text: str = "text"
    """Column that holds the text (`text`), the segments (`segments`) or the tokens (`tokens`); the last two are also
    found under `segments` and `input_ids`."""
    prompt: str = "prompt"
    """Column that holds the prompt (`completion`); of a chat without messages, what the user says, or messages."""
    completion: str = "completion"
    """Column that holds what follows the prompt (`completion`); of a chat without messages, the answer, or messages."""
    messages: str = "messages"
    """Column that holds the messages, objects with `role` and `content`, or `from` and `value` (`chat`); also found
    under `conversations`."""
    tools: str | None = None
    """Column that holds the tools that the assistant may call (`chat`); null: `tools` or `functions` where rows have
    it, "": none."""
    system: str | None = None
    """Column that holds what the system says before all (`chat`); null: `system` or `system_prompt` where rows have it,
    "": none."""
    input: str | None = None
    """Column that holds what belongs to an instruction, as of alpaca; null: `input` beside `instruction`, "": none."""
    history: str | None = None
    """Column that holds earlier pairs of a question and an answer, as of alpaca (`chat`); null: `history` beside
    `instruction`, "": none."""
    learned: str | None = None
    """Column that says which tokens are learned (`tokens`), labels with -100 or a mask of 0 and 1; null: `labels`,
    `completion_mask`, `assistant_masks` or `loss_mask` where rows have it, "": all are."""
    weight: str | None = None
    """Column that holds how much a row counts for, a number from 0; what counts 0 is left out, and said."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template is given besides, such as `enable_thinking`; a column of this name says it by row."""
    loss_on: Literal["answers", "last", "all"] = "answers"
    """Completions and all turns of the assistant, the last turn only, or every token; a plain text is an answer."""
    mask: list[Literal["reasoning", "scaffold"]] = []
    """What of answers is not learned: their reasoning, or what the template writes before plain ones (`chat`)."""
    template: str | None = None
    """File with a chat template, in place of the tokenizer's own; exported with the model."""
    today: Annotated[date, Field(strict=False)] | None = None
    """The day that a template is told; one that asks for it is refused without, for it would change the tokens."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    generate: Generation = Generation()
    """How answers are written, in samples while training and in `predict`."""


class Seq2Seq(Section):
    """A text for each text: translations, summaries."""

    kind: Literal["seq2seq"]
    source: str = "source"
    """Column that holds the text that is given; `translation.en` is the `en` of what a column `translation` holds."""
    target: str = "target"
    """Column that holds the text that is to be written."""
    prefix: str = ""
    """What is put before each source, such as "summarize: " for T5."""
    max_target_length: Positive = 128
    """Tokens of a target at most; longer ones lose their end."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over the vocabulary."""
    generate: Generation = Generation()
    """How answers are written, in evaluation and in `predict`."""


TaskSection = (
    SequenceClassification
    | MultiLabelClassification
    | Regression
    | TokenClassification
    | QuestionAnswering
    | CausalLM
    | ImageClassification
    | Seq2Seq
)
