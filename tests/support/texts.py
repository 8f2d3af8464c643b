"""Sentences of a few words."""

WORDS = [
    "the", "small", "teacher", "reads", "a", "long", "prompt", "and", "answers", "with", "care", "while", "every",
    "student", "copies", "what", "it", "says",
]  # fmt: skip


def sentence(n: int, start: int) -> str:
    return " ".join(WORDS[(start * 7 + 3 * i) % len(WORDS)] for i in range(n))
