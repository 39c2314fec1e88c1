"""Generate answers to questions with four options, by kind, with the letter that each answer means."""

from __future__ import annotations

import random
from dataclasses import dataclass

LETTERS = "ABCD"
# Templates of each kind. Fields: `right` and `wrong` are letters, `text` and `other` the texts of these options, and
# `why` is a reason. All kinds are equally frequent, and so are the templates of a kind.
# The answer means one option, and its letter is the only one that it states.
ONE_LETTER = {
    "letter alone": ("{right}", "{right}.", "{right}\n", "{right})", "{right}:"),
    "letter in brackets": ("({right})", "[{right}]", "({right}).", "Option {right}", "Option ({right})."),
    "letter and option": (
        "{right}. {text}",
        "{right}) {text}.",
        "{right}: {text}",
        "({right}) {text}",
        "{right} - {text}",
    ),
    "phrase": (
        "The answer is {right}.",
        "The correct answer is ({right}).",
        "Answer: {right}",
        "The best option is {right}",
        "I choose {right}.",
        "Final answer: ({right})",
    ),
    "phrase and option": (
        "The answer is {right}. {text}.",
        "The correct answer is ({right}) {text}.",
        "Answer: {right}. {text}",
        "The correct option is {right}: {text}.",
    ),
    "sentence": (
        "It is {right}.",
        "I think it is {right}.",
        "{right} is correct.",
        "Option {right} is the correct answer.",
        "Option {right} fits the video best.",
        "The video supports option {right}.",
    ),
    "letter, then reason": (
        "{right}. {why}",
        "{right}\n\n{why}",
        "{right} because it is shown several times.",
        "({right})\n\nExplanation: {why}",
    ),
    "reason, then letter": (
        "{why} Therefore, the answer is {right}.",
        "{why} So the correct answer is ({right}).",
        "{why}\n\nAnswer: {right}",
        "{why} Hence, {right}.",
        "{why} Option {right} matches this.",
    ),
    "tags": (
        "<think>{why}</think>{right}",
        "<think>\n{why} It is not {wrong}.\n</think>\n\n<answer>{right}</answer>",
        "<answer>{right}</answer>",
        "<think>{why}</think>\n<answer>{right}. {text}</answer>",
        "<answer>({right})</answer>",
        "{why}\n<answer>{right}</answer>",
    ),
    "LaTeX": (
        r"\boxed{{{right}}}",
        r"$\boxed{{{right}}}$",
        r"The answer is $\boxed{{{right}}}$.",
        r"\boxed{{\text{{{right}}}}}",
        r"{why} \[\boxed{{\text{{({right})}}}}\]",
    ),
    "Markdown": (
        "**{right}**",
        "**{right}.** {text}",
        "The answer is **{right}**.",
        "**Answer: {right}**",
        "{why}\n\n**Answer:** {right}",
        "### Answer\n{right}",
    ),
    "JSON": (
        '{{"answer": "{right}"}}',
        '```json\n{{"answer": "{right}"}}\n```',
        '{{"reason": "{why}", "answer": "{right}"}}',
    ),
    "other languages": (
        *(
            "答案是{right}",
            "答案为{right}。",
            "正确答案是 {right}",
            "选{right}",
            "答えは{right}です",
            "정답은 {right}입니다.",
        ),
        *(
            "답: {right}",
            "La respuesta correcta es {right}.",
            "Die Antwort ist {right}.",
            "La bonne réponse est {right}.",
        ),
    ),
}
# The answer means one option, but has no letter, or more than one.
OTHER_FORMS = {
    "text of the option": ("{text}", "{text}.", "The answer is {text}.", "The correct answer is: {text}"),
    "all options discussed": (
        "{wrong}. {other} - not shown.\n{right}. {text} - shown.\n\nThe answer is {right}.",
        "Option {wrong} ({other}) does not fit. {why} The correct answer is {right}.",
        "{wrong}: {other} is wrong.\n{right}: {text} is right.\nAnswer: {right}",
    ),
    "another option denied": (
        "Not {wrong}. The answer is {right}.",
        "It is not {wrong} but {right}.",
        "{wrong} is wrong, so the answer is {right}.",
        "The answer is not {wrong}, it is {right}.",
        "The answer is {right}, not {wrong}.",
    ),
    "answer corrected": (
        "{wrong}. Wait, no: the answer is {right}.",
        "The answer is {wrong}. Actually, the answer is {right}.",
        "First I thought {wrong}, but the answer is {right}.",
    ),
}
# The answer means no option.
NO_OPTION = {
    "refusal": (
        "I'm sorry, but I can't see the video.",
        "As an AI language model, I cannot watch videos.",
        "I cannot determine the answer from the frames.",
        "None of the options is correct.",
        "I don't know.",
        "抱歉，我无法观看视频。",
    ),
    "no letter": (
        "{why}",
        "The video shows several people in a park.",
        "A man walks past the camera.",
        "Based on the video, this is not shown.",
        "The answer is not clear.",
    ),
}
# The answer names two options, and nobody knows which one is meant.
UNCLEAR = {
    "two letters": ("{right} or {wrong}", "{right}, {wrong}", "Either {right} or {wrong}.", "{right} and {wrong}"),
}
KINDS = {**ONE_LETTER, **OTHER_FORMS, **NO_OPTION, **UNCLEAR}
_TEXTS = (
    *("Apples", "A red car", "At the beginning", "An old man", "Candles", "Berries", "By train", "Cooking", "Dancing"),
    *("Because it rains", "Cleaning the kitchen", "Down the stairs", "The blue door", "Three times", "12", "In Berlin"),
    *(
        "He drops the cup",
        "Yes, twice",
        "Water",
        "To show how glass is made",
        "Football",
        "00:35",
        "Green",
        "Her brother",
    ),
)
_REASONS = (
    "The man lights them before the guests arrive.",
    "At 00:12, a woman opens the window and looks outside.",
    "Based on the video, this happens near the end.",
    "Cars and people pass in the background.",
    "During the second half, the camera follows the group.",
    "A sign in the first scene says so.",
)


@dataclass(frozen=True)
class Answer:
    """An answer to a question with four options.

    meant: the letter of the option that the answer means; None if it means no option, or nobody knows which.
    """

    kind: str
    text: str
    options: tuple[str, ...]
    meant: str | None


def generate(count: int, seed: int = 0) -> list[Answer]:
    """Return `count` answers, as many of each kind as of the others (a difference of one is possible)."""
    rng = random.Random(seed)
    answers = []
    for index in range(count):
        kind = list(KINDS)[index % len(KINDS)]
        templates = KINDS[kind]
        options = tuple(rng.sample(_TEXTS, 4))
        right, wrong = rng.sample(range(4), 2)
        fields = {"right": LETTERS[right], "wrong": LETTERS[wrong], "text": options[right], "other": options[wrong]}
        text = templates[index // len(KINDS) % len(templates)].format(**fields, why=rng.choice(_REASONS))
        meant = LETTERS[right] if kind in ONE_LETTER or kind in OTHER_FORMS else None
        answers.append(Answer(kind, text, options, meant))
    return answers
