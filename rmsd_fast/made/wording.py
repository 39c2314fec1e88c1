"""Word open answers about generated clips like the reference, or as paraphrases that share few words with it.

Both are simulated. The paraphrases name the same color, shape and place, but share few words with the reference. With
`made.wording=paraphrased`, word overlap (F1) therefore ranks every wrong answer, which is in the reference's wording,
above every right one (tested). `meaning` reads both wordings.
"""

from __future__ import annotations

import random

from rmsd_fast.made.clips import COLORS, SHAPES, article

PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
# Words of a place in the reference, and in the paraphrases.
_OTHER_WORDS = {"top": "upper", "bottom": "lower", "centre": "middle"}
PARAPHRASES = (
    "In the {place} part there is one shape of the kind {shape}, colored {color}.",
    "Its color is {color}, its kind is {shape}, and it is in the {place} part.",
    "The {place} part shows one shape: its kind is {shape}, its color is {color}.",
    "One shape is seen, colored {color} and of the kind {shape}, in the {place} part.",
)


def reference_text(color: str, shape: str, place: str) -> str:
    """Return a description in the wording of the reference answers."""
    return f"{article(color)} {color} {shape} at the {place}.".capitalize()


def paraphrase(color: str, shape: str, place: str, rng: random.Random) -> str:
    """Return the same description in one of the other wordings."""
    words = " ".join(_OTHER_WORDS.get(word, word) for word in place.split())
    return rng.choice(PARAPHRASES).format(color=color, shape=shape, place=words)


def wrong_text(color: str, shape: str, place: str, rng: random.Random) -> str:
    """Return a description in the reference's wording with another color, another shape or another place."""
    stated = {"color": color, "shape": shape, "place": place}
    values = {"color": tuple(COLORS), "shape": SHAPES, "place": PLACES}
    changed = rng.choice(list(stated))
    stated[changed] = rng.choice([value for value in values[changed] if value != stated[changed]])
    return reference_text(**stated)
