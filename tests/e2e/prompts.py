"""Seeded prompts of natural text, of lengths that straddle block and chunk borders."""

import random
from pydoc_data import topics

BORDERS = (
    *(1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 79, 80, 81, 95, 96, 97),
    *(127, 128, 129, 191, 192, 193, 255, 256, 257, 383, 384, 385, 511, 512, 513, 514),
    *(640, 641, 768, 769, 1023, 1024, 1025, 1280, 1537, 1999, 2000),
)
NUM_RANDOM = 5


def text_of_length(num_characters: int, seed: int) -> str:
    """A stretch of the Python language reference."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    start = random.Random(seed).randrange(len(text) - num_characters)
    return text[start : start + num_characters]


def prompt_lengths() -> list[int]:
    """At least 50 lengths of 1 to 2 000 tokens; few long ones, which take a second each."""
    generator = random.Random(0)
    return [*BORDERS, *(generator.randint(1, 1000) for _ in range(NUM_RANDOM))]
