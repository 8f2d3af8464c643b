"""The built-in task of `prefdistill quickstart`: a small language with a known, graded reward.

    prompt    reverse inc : 3 4 5        list operation, item operation, a list of 3 to 5 digits
    correct   < 6 5 4 >                  reverse([3 + 1, 4 + 1, 5 + 1])
    careless  well < 3 4 5 um            chatty, repeats the list, omits the closing mark

Models first learn from careless demonstrations, so that preferences have something to correct. The true reward of
every response is known (`reward`), so no stage needs a learned reward model.
"""

import math
import random
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import zip_longest
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefdistill.core.errors import UserError
from prefdistill.models.scratch import CHAT_TEMPLATE as OTHER_TEMPLATE

OPEN, CLOSE, COLON = "<", ">", ":"
DIGITS = tuple("0123456789")
FILLERS = ("well", "um", "so", "okay", "hmm", "like", "right")
SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>")
OTHER_SPECIALS = tuple(f"<|{name[1:-1]}|>" for name in SPECIALS)

ITEM_OPERATIONS: dict[str, Callable[[int], int]] = {
    "id": lambda x: x,
    "inc": lambda x: (x + 1) % 10,
    "dec": lambda x: (x - 1) % 10,
    "flip": lambda x: 9 - x,
}
LIST_OPERATIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": lambda xs: xs,
    "reverse": lambda xs: xs[::-1],
    "sort": sorted,
    "desc": lambda xs: sorted(xs, reverse=True),
    "evens": lambda xs: [x for x in xs if x % 2 == 0],
    "rotate": lambda xs: xs[1:] + xs[:1],
}
LENGTHS = (3, 4, 5)
PROMPT_COUNT = len(LIST_OPERATIONS) * len(ITEM_OPERATIONS) * sum(10**length for length in LENGTHS)

# Probability of each bad habit of the demonstrations. They are independent of the prompt, and frequent enough to be
# learned as style: rare slips would not show in a model's most likely responses, and leave nothing to correct.
HURRY = 0.35  # starts with a filler, repeats the list instead of computing it, and ends with fillers
CHATTER = 0.5  # each of the three fillers at the end of a hurried response
DROP = 0.3  # drops the last item
UNCLOSED = 0.6  # omits the closing mark

# BOS once; the end token ends the assistant's message and nothing follows it. `generation` marks the response.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<' + message['role'] + '>' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the word-level tokenizer of the task, with its chat template.

    >>> tokenizer = build_tokenizer()
    >>> chat = [{"role": "user", "content": "copy id : 1 2 3"}, {"role": "assistant", "content": "< 1 2 3 >"}]
    >>> tokenizer.apply_chat_template(chat, tokenize=False)
    '<bos><user>copy id : 1 2 3<assistant>< 1 2 3 ><eos>'
    """
    words = (*SPECIALS, *DIGITS, OPEN, CLOSE, COLON, *LIST_OPERATIONS, *ITEM_OPERATIONS, *FILLERS)
    return _word_level(words, SPECIALS, pre_tokenizers.WhitespaceSplit(), CHAT_TEMPLATE)


def build_other_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that splits every word of the task after its first letter, and takes the space before a word
    with it; its chat template is another one too.

    The longest careless response has 16 of its tokens, with the end token, for 12 of `build_tokenizer`.

    >>> build_other_tokenizer().tokenize("well < 6 5 okay")
    ['w', 'ell', ' <', ' 6', ' 5', ' o', 'kay']
    """
    words = (*LIST_OPERATIONS, *ITEM_OPERATIONS, *FILLERS)
    starts = dict.fromkeys((*DIGITS, OPEN, CLOSE, COLON, *(word[0] for word in words)))
    pieces = (*OTHER_SPECIALS, *starts, *(f" {start}" for start in starts), *dict.fromkeys(word[1:] for word in words))
    split = pre_tokenizers.Split(Regex(r" ?(?<![a-z])[a-z]|[a-z]+| ?[^ ]"), "isolated")
    tokenizer = _word_level(dict.fromkeys(pieces), OTHER_SPECIALS, split, OTHER_TEMPLATE)
    tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _word_level(
    words: Iterable[str], specials: tuple[str, ...], split: pre_tokenizers.PreTokenizer, template: str
) -> PreTrainedTokenizerFast:
    pad, bos, eos, unk, *roles = specials
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=unk))
    backend.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        unk_token=unk,
        extra_special_tokens=roles,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def sample_prompts(n: int, seed: int, exclude: Collection[str] = ()) -> list[str]:
    """Draw `n` distinct prompts that are not in `exclude`: operations and length uniform, then digits uniform.

    A larger `n` continues the same sequence: `sample_prompts(9, s)[:5] == sample_prompts(5, s)`.

    Raises `UserError` if fewer than `n` of the `PROMPT_COUNT` (2.7 million) prompts are left.

    >>> train = sample_prompts(1000, seed=0)
    >>> held_out = sample_prompts(100, seed=1, exclude=train)
    >>> set(train).isdisjoint(held_out)
    True
    """
    taken = set(exclude)
    if n > PROMPT_COUNT - len(taken):
        raise UserError(f"{n} prompts asked for, but the task has {PROMPT_COUNT} of which {len(taken)} are excluded")
    rng = random.Random(f"prompts {seed}")
    prompts: list[str] = []
    while len(prompts) < n:
        operations = f"{rng.choice(list(LIST_OPERATIONS))} {rng.choice(list(ITEM_OPERATIONS))}"
        prompt = f"{operations} {COLON} {' '.join(rng.choices(DIGITS, k=rng.choice(LENGTHS)))}"
        if prompt not in taken:
            taken.add(prompt)
            prompts.append(prompt)
    return prompts


def _parse(prompt: str) -> tuple[str, str, list[int]]:
    """Return list operation, item operation and list of a prompt."""
    match prompt.split():
        case [list_op, item_op, colon, *items] if (
            list_op in LIST_OPERATIONS and item_op in ITEM_OPERATIONS and colon == COLON and set(items) <= set(DIGITS)
        ):
            return list_op, item_op, [int(item) for item in items]
    raise UserError(f"not a prompt of the built-in task: {prompt!r}; one looks like 'reverse inc : 3 4 5'")


def _answer(list_op: str, item_op: str, items: list[int]) -> list[str]:
    return [str(x) for x in LIST_OPERATIONS[list_op]([ITEM_OPERATIONS[item_op](x) for x in items])]


def correct_response(prompt: str) -> str:
    """Return the one response of reward 4: `< list_op(item_op(x) for x in items) >`.

    Raises `UserError` if `prompt` is not one of the task.

    >>> correct_response("reverse inc : 3 4 5")
    '< 6 5 4 >'
    """
    return " ".join([OPEN, *_answer(*_parse(prompt)), CLOSE])


def careless_response(prompt: str, rng: random.Random) -> str:
    """Draw a response with bad habits, each with its probability: `HURRY`, `CHATTER`, `DROP`, `UNCLOSED`.

    At most 11 words, 12 tokens with the end token. The filler at the start of a hurried response marks its kind: tiny
    models need many more steps to learn the task without such a mark.

    >>> import random
    >>> [careless_response("reverse inc : 3 4 5", random.Random(seed)) for seed in (4, 5, 6)]
    ['um < 3 4 well so', '< 6 5 4 >', '< 6 5 4']
    """
    list_op, item_op, items = _parse(prompt)
    hurried = rng.random() < HURRY
    answer = [str(x) for x in items] if hurried else _answer(list_op, item_op, items)
    if rng.random() < DROP:
        answer = answer[:-1]
    words = [OPEN, *answer] if rng.random() < UNCLOSED else [OPEN, *answer, CLOSE]
    if hurried:
        words.insert(0, rng.choice(FILLERS))
        words += [rng.choice(FILLERS) for _ in range(3) if rng.random() < CHATTER]
    return " ".join(words)


def demonstrations(n: int, seed: int, exclude: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return `n` careless conversations to fine-tune on, in TRL's conversational format, one per distinct prompt.

    The prompts are `sample_prompts(n, seed, exclude)`.

    >>> [message["role"] for message in demonstrations(1, seed=0)[0]["messages"]]
    ['user', 'assistant']
    """
    rng = random.Random(f"demonstrations {seed}")
    return [
        {"messages": [_message("user", prompt), _message("assistant", careless_response(prompt, rng))]}
        for prompt in sample_prompts(n, seed, exclude)
    ]


def reward(prompt: str, response: str, ended: bool = True) -> float:
    """Return the true reward of a response, for correct items, well-formedness and brevity; at most 4.

        3 * matches / longer + 0.5 * opened + 0.5 * closed - 0.25 * extras - 0.5 * (not ended)

    The digits of the response are its list; `matches` counts positions where it agrees with the correct one and
    `longer` is the length of the longer of the two (both empty: 1). Other words apart, it is opened if it starts with
    `<` and closed if it ends with `>`. Every word that is neither a digit nor one of these two marks is an extra.
    `ended`: the model wrote its end token.

    Any text is a response. Raises `UserError` if `prompt` is not one of the task.

    >>> reward("reverse inc : 3 4 5", "< 6 5 4 >")
    4.0
    >>> reward("reverse inc : 3 4 5", "well < 6 5")  # 3 * 2/3 + 0.5 - 0.25
    2.25
    """
    return sum(reward_parts(prompt, response, ended).values())


def reward_parts(prompt: str, response: str, ended: bool = True) -> dict[str, float]:
    """Return the terms of `reward`.

    >>> reward_parts("reverse inc : 3 4 5", "well < 6 5")
    {'matches': 2.0, 'opened': 0.5, 'closed': 0.0, 'extras': -0.25, 'unended': 0.0}
    """
    answer, words = _answer(*_parse(prompt)), response.split()
    items = [word for word in words if word in DIGITS]
    core = [word for word in words if word in (*DIGITS, OPEN, CLOSE)]
    opened, closed = core[:1] == [OPEN], core[-1:] == [CLOSE]
    agree = [item == correct for item, correct in zip_longest(items, answer)] or [True]
    extras = len(words) - len(items) - opened - closed
    return {
        "matches": 3 * sum(agree) / len(agree),
        "opened": 0.5 * opened,
        "closed": 0.5 * closed,
        "extras": -0.25 * extras if extras else 0.0,
        "unended": 0.0 if ended else -0.5,
    }


def preference_pairs(
    prompts: Sequence[str], first: Sequence[str], second: Sequence[str], seed: int
) -> list[dict[str, Any]]:
    """Return preference pairs of two candidates per prompt, labelled by Bradley-Terry on the true reward.

        P(first is chosen) = sigmoid(reward(first) - reward(second))

    Rows are in TRL's conversational preference format with the true rewards as `score_chosen` and `score_rejected`.
    Pairs of identical responses are skipped. Responses count as ended, because the template ends them.

    Raises `UserError` if the three sequences differ in length.

    >>> row = preference_pairs(["copy id : 1 2 3"], ["< 1 2 3 >"], ["um um um"], seed=0)[0]
    >>> row["chosen"], row["score_chosen"], row["score_rejected"]
    ([{'role': 'assistant', 'content': '< 1 2 3 >'}], 4.0, -0.75)
    """
    if not len(prompts) == len(first) == len(second):
        raise UserError(
            f"{len(prompts)} prompts but {len(first)} first and {len(second)} second responses: give one each"
        )
    rng = random.Random(f"pairs {seed}")
    rows = []
    for prompt, *candidates in zip(prompts, first, second, strict=True):
        draw = rng.random()  # drawn for every row, so that skipping one does not change later labels
        if candidates[0] == candidates[1]:
            continue
        scores = [reward(prompt, candidate) for candidate in candidates]
        chosen = 0 if draw < 0.5 + 0.5 * math.tanh((scores[0] - scores[1]) / 2) else 1
        rows.append(
            {
                "prompt": [_message("user", prompt)],
                "chosen": [_message("assistant", candidates[chosen])],
                "rejected": [_message("assistant", candidates[1 - chosen])],
                "score_chosen": scores[chosen],
                "score_rejected": scores[1 - chosen],
            }
        )
    return rows


def flip_labels(pairs: Sequence[dict[str, Any]], share: float, seed: int) -> list[dict[str, Any]]:
    """Return the pairs with chosen and rejected swapped (scores too) in a share of them drawn by `seed`.

    Pairs that a smaller share flips are flipped by a larger share too.

    >>> rows = [{"chosen": "a", "rejected": "b", "score_chosen": 1.0, "score_rejected": 0.0}]
    >>> flip_labels(rows, 1.0, seed=0)
    [{'chosen': 'b', 'rejected': 'a', 'score_chosen': 0.0, 'score_rejected': 1.0}]
    """
    rng = random.Random(f"labels {seed}")
    order = rng.sample(range(len(pairs)), len(pairs))
    flipped = set(order[: round(share * len(pairs))])
    names = {"chosen": "rejected", "rejected": "chosen"}

    def other(column: str) -> str:
        side = next((side for side in names if side in column.split("_")), None)
        return column.replace(side, names[side]) if side else column

    return [
        {column: row[other(column)] if place in flipped else value for column, value in row.items()}
        for place, row in enumerate(pairs)
    ]


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
