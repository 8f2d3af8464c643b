"""Responses: ROUGE-L is rouge-score's, the reward model reads what RewardTrainer reads, ranges by hand, the verb."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from rouge_score import rouge_scorer

from prefdistill.cli import main
from prefdistill.core.errors import UserError
from prefdistill.data.encoder import reward_model_ids
from prefdistill.data.load import load_prompts
from prefdistill.data.prompts import prompt_text
from prefdistill.evaluation.measure import Measured, by_length, length_ranges, mean_of, points
from prefdistill.evaluation.metric_inputs import Responses, rouge_l
from prefdistill.evaluation.responses import (
    log_ratios,
    measure_responses,
    measure_texts,
    references_of,
    scores_by_prompt,
    unique_prompts,
)
from prefdistill.evaluation.reward_model import RewardModel, accuracy_of
from prefdistill.evaluation.stats import crossed, estimate, pair_wins
from prefdistill.models.scratch import random_model
from prefdistill.sampling.files import sample_responses

SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def assistant_messages(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def user_messages(*texts):
    return [[{"role": "user", "content": text}] for text in texts]


# -- texts -------------------------------------------------------------------------------------------------------------


def test_rouge_l_is_rouge_scores():
    responses = ["The cats were running, fast!", "", "b a", "same words here", "réponse naïve"]
    references = ["A cat runs fast.", "nothing", "a b", "same words here", "réponse"]
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    expected = [
        scorer.score(target, text)["rougeL"].fmeasure for target, text in zip(references, responses, strict=True)
    ]
    assert rouge_l(responses, references) == expected
    assert expected[3] == 1
    assert expected[1] == 0
    assert expected[2] == 0.5  # one of two words in order


def test_texts_by_hand():
    responses = Responses(
        user_messages("p", "q", "p"), ["one two", " three ", ""], [3, 2, 1], ["one two", "three", "one two"]
    )
    measured = Measured()
    measure_texts(measured, responses)
    assert measured.items["exact_match"] == [1, 1, 0]
    assert measured.items["response_words"] == [2, 1, 0]
    assert measured.items["response_tokens"] == [3, 2, 1]
    assert measured.items["reference_words"] == [2, 1, 2]
    assert measured.items["rouge_l"] == [1, 1, 0]
    assert measured.groups["rouge_l"] == [0, 1, 0]
    assert mean_of([[measured]], "exact_match") == estimate([1, 1, 0], "pqp") | {"over": "test prompts"}
    alone = Measured()
    measure_texts(alone, Responses(["p"], ["text"]))
    assert alone.items.keys() == {"response_words"}


def test_log_ratios_to_the_start_are_what_a_naive_forward_gives(tmp_path, pairs, make_model, tokenizer):
    student, start = make_model(1), make_model(2)
    prompts = unique_prompts(pairs, 6).select_columns(["prompt"])
    sampled = sample_responses(student, prompts, tokenizer, tmp_path / "r.jsonl", column="response", max_new_tokens=9)
    ratios = log_ratios(student, start, sampled, tokenizer)

    @torch.no_grad()
    def naive(model, row):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        response = torch.tensor(row["response_ids"])
        logits = model(torch.tensor([ids + row["response_ids"]])).logits[0, len(ids) - 1 : -1].double()
        return float(logits.log_softmax(-1)[torch.arange(len(response)), response].sum())

    expected = [naive(student, row) - naive(start, row) for row in sampled]
    np.testing.assert_allclose(ratios, expected, rtol=1e-4, atol=1e-4)
    assert np.mean(ratios) > 1  # two random models
    np.testing.assert_array_equal(log_ratios(start, start, sampled, tokenizer), 0)
    measured = Measured()
    measure_responses(measured, sampled, pairs, None, prompts=4, samples=0, log_ratios=ratios)
    np.testing.assert_array_equal(measured.items["kl_start"], ratios[:4])


def test_prompts_are_unique_and_compared_with_their_first_reference():
    rows = Dataset.from_list(
        [
            {"prompt": p, "chosen": c}
            for p, c in zip(user_messages("a", "b", "a", "c"), assistant_messages("1", "2", "3", "4"), strict=True)
        ]
    )
    assert unique_prompts(rows)["chosen"] == assistant_messages("1", "2", "4")
    assert unique_prompts(rows, 2)["chosen"] == assistant_messages("1", "2")
    responses = Dataset.from_list(
        [
            {"prompt": user_messages("c")[0], "own": assistant_messages("x")[0]},
            {"prompt": user_messages("a")[0], "own": assistant_messages("y")[0]},
        ]
    )
    results = Responses.read(responses, "own", references_of(rows))
    assert (results.texts, results.references, results.tokens) == (["x", "y"], ["4", "1"], None)
    with pytest.raises(
        UserError, match=r"no column 'response'; their columns: prompt, own\. Name the right one with --column"
    ):
        Responses.read(responses)
    with pytest.raises(UserError, match="1 prompts of the responses are not in the data"):
        Responses.read(responses, "own", references_of(rows.select([0])))
    assert references_of(rows.select_columns("prompt")) == {}


# -- ranges of length --------------------------------------------------------------------------------------------------


def test_ranges_are_by_the_words_of_the_reference():
    assert length_ranges([], [5, 10, 50]) == [(0, 5), (6, 10), (11, 50), (51, None)]
    assert length_ranges([], [10, 5, 5]) == [(0, 5), (6, 10), (11, None)]
    assert length_ranges([1, 2, 3, 4, 5]) == [(0, 2), (3, 3), (4, 4), (5, None)]
    assert length_ranges([7, 7]) == [(0, 7), (8, None)]


def test_metrics_by_range():
    def run(rouge, words=(3, 5, 6, 90)):
        measured = Measured()
        measured.add("rouge_l", rouge)
        measured.add("reference_words", words)
        return measured

    first, second = [[run([0, 1, 0.5, 0.25])]], [[run([1, 1, 1, 1])]]
    results = by_length({"first": first, "second": second, "silent": [[Measured()]]}, [5, 50, 70])
    assert results.keys() == {"rouge_l"}
    assert [(row["low"], row["high"], row["n"]) for row in results["rouge_l"]] == [(0, 5, 2), (6, 50, 1), (71, None, 1)]
    assert results["rouge_l"][0]["methods"]["first"] == estimate([0, 1]) | {"over": "test prompts"}
    assert results["rouge_l"][1]["methods"]["first"] == {"mean": 0.5, "se": None, "n": 1, "over": "test prompts"}
    assert results["rouge_l"][2]["methods"]["second"]["mean"] == 1
    orders = by_length({"first": [[run([0, 1, 0.5, 0.25]), run([0, 0, 0, 0])]]}, [5])
    assert orders["rouge_l"][0]["methods"]["first"] == crossed([[0, 1], [0, 0]]) | {"over": "data orders"}
    assert by_length({"silent": [[Measured()]]}) == {}


def test_points_are_length_and_score():
    measured = Measured()
    measured.add("response_tokens", [3, 4, 5])
    assert points(measured) == []
    measured.add("reward_model_score", [0.5, -1, 2])
    assert points(measured, 2) == [[3, 0.5], [4, -1]]
    measured.add("reward", [1, 2, 3])
    assert points(measured)[0] == [3, 1]


# -- the reward model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, tokenizer):
    """A random reward model whose scores differ."""
    place = tmp_path_factory.mktemp("reward") / "model"
    model = random_model(tokenizer, SHAPE | {"max_position_embeddings": 24}, 3, reward=True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return str(place)


def test_reward_model_ids_are_those_that_trl_trains_on(tokenizer, pairs, tmp_path):
    from trl import RewardConfig, RewardTrainer

    def trained_on(rows):
        args = RewardConfig(str(tmp_path), use_cpu=True, bf16=False, max_length=None, report_to="none")
        model = random_model(tokenizer, SHAPE, 0, reward=True)
        return RewardTrainer(model, args, train_dataset=rows, processing_class=tokenizer).train_dataset

    few = pairs.select(range(6)).select_columns(["prompt", "chosen", "rejected"])
    plain = Dataset.from_list([{key: value[0]["content"] for key, value in row.items()} for row in few])
    for rows in (few, plain):
        encoded = trained_on(rows)
        for row, both in zip(rows, encoded, strict=True):
            for side in ("chosen", "rejected"):
                assert reward_model_ids(tokenizer, row["prompt"], row[side]) == both[f"{side}_ids"]
    row = few[0]
    assert reward_model_ids(tokenizer, row["prompt"], row["chosen"][0]["content"]) == trained_on(few)[0]["chosen_ids"]


@pytest.mark.parametrize("spare_ids", [True, False])
def test_scores_without_a_pad_token_are_those_of_the_models_own_forward(
    reward_model, tokenizer, pairs, tmp_path, monkeypatch, spare_ids
):
    """The padding hides no end token, whether or not an id is left over for it."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    own = AutoModelForSequenceClassification.from_pretrained(reward_model)
    own.config.pad_token_id = None
    own.save_pretrained(tmp_path)
    without_pad = AutoTokenizer.from_pretrained(reward_model)
    without_pad.pad_token = None
    without_pad.save_pretrained(tmp_path)
    model = RewardModel(str(tmp_path))
    if not spare_ids:
        monkeypatch.setattr(model, "_unused_id", lambda ids: None)
    prompts, responses = pairs["prompt"][:8], pairs["chosen"][:8]
    scores = model.score(prompts, responses)
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        ids = reward_model_ids(tokenizer, prompt, response)[:24]
        with torch.no_grad():
            expected = float(own(input_ids=torch.tensor([ids])).logits[0, 0])
        assert score == pytest.approx(expected, abs=1e-4)
        assert model.score([prompt], [response])[0] == pytest.approx(expected, abs=1e-4)


def test_scores_are_those_of_each_text_alone(reward_model, tokenizer, pairs):
    """Batches pad on the right, and a text is cut where the positions end."""
    model = RewardModel(reward_model, batch_tokens=100)
    prompts, responses = pairs["prompt"][:], pairs["chosen"][:]
    results = model.score(prompts, responses)
    lengths = []
    for prompt, response, score in zip(prompts, responses, results, strict=True):
        ids = reward_model_ids(tokenizer, prompt, response)
        lengths.append(len(ids))
        with torch.no_grad():
            alone = model.model(input_ids=torch.tensor([ids[:24]])).logits[0, 0]
        assert score == pytest.approx(float(alone), abs=1e-4)
    assert max(lengths) > 24 > min(lengths)
    assert len(set(results)) > 12
    batches = model._batches(lengths)
    assert sorted(place for batch in batches for place in batch) == list(range(24))
    assert all(len(batch) * max(lengths[place] for place in batch) <= 100 or len(batch) == 1 for batch in batches)


def test_wins_against_all_other_responses_to_a_prompt():
    others = scores_by_prompt(["p", "q", "p", "p", "r"], [1, 5, 2, 3, 9])
    responses = Responses(["p", "q"], ["2", "5"], scores=[2, 5], opponents={"chosen": others})
    measured = Measured()
    measure_texts(measured, responses)
    assert measured.items["reward_model_score"] == [2, 5]
    assert measured.items["reward_model_win_rate_chosen"] == [0.5, 0.5]  # a win, a tie and a loss; a tie
    assert "reward_model_win_rate_against" not in measured.items
    lacking = Responses(["p", "q"], ["2", "5"], scores=[1, 2], opponents={"against": scores_by_prompt(["p"], [1])})
    with pytest.raises(UserError, match="the responses to compare with lack the prompt q"):
        lacking.win_rates("against")


def test_accuracy_of_a_reward_model(reward_model, pairs, tokenizer):
    model = RewardModel(reward_model)
    on_pairs = model.score_pairs(pairs)
    scores = [model.score(pairs["prompt"][:], pairs[side][:]) for side in ("chosen", "rejected")]
    assert on_pairs.items["accuracy"] == pair_wins(*scores).tolist()
    longer = [
        pair_wins(*([len(reward_model_ids(tokenizer, row["prompt"], row[side]))] for side in ("chosen", "rejected")))[0]
        for row in pairs
    ]
    assert on_pairs.items["longer_is_better"] == longer
    about = accuracy_of("it", [on_pairs])
    assert about["accuracy"] == estimate(on_pairs.items["accuracy"]) | {"over": "test prompts"}
    assert (about["name"], about["pairs"]) == ("it", 24)


def test_models_that_are_no_reward_models_are_refused(tmp_path, make_model, tokenizer):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    make_model().save_pretrained(tmp_path / "language")
    tokenizer.save_pretrained(tmp_path / "language")
    with pytest.raises(UserError, match="it is a language model, LlamaForCausalLM"):
        RewardModel(str(tmp_path / "language"))
    several = LlamaForSequenceClassification(LlamaConfig(**SHAPE, vocab_size=len(tokenizer), num_labels=3))
    several.save_pretrained(tmp_path / "several")
    with pytest.raises(UserError, match="has 3 labels; a reward model has one"):
        RewardModel(str(tmp_path / "several"))
    with pytest.raises(UserError, match="no reward model at 'nowhere'"):
        RewardModel("nowhere")
    bare = random_model(tokenizer, SHAPE, 0, reward=True)
    bare.save_pretrained(tmp_path / "bare")
    tokenizer.save_pretrained(tmp_path / "bare")
    (tmp_path / "bare" / "chat_template.jinja").unlink()
    model = RewardModel(str(tmp_path / "bare"))
    with pytest.raises(UserError, match="has no chat template, and the data are conversations"):
        model.score(user_messages("p"), ["r"])
    assert np.isfinite(model.score(["plain prompt "], ["and response"])).all()


# -- the verb ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch, make_model, tokenizer, pairs):
    monkeypatch.chdir(tmp_path)
    with open("pairs.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in [*pairs, pairs[0]])
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path


EVALUATE = ["evaluate", "--out", "e.json"]
SAMPLE = [*EVALUATE, "--model", "model", "--data", "pairs.jsonl", "--max-new-tokens", "8"]


def stderr_of(capfd):
    return capfd.readouterr().err


def test_responses_are_sampled_once_and_scored(place, reward_model, capfd):
    scored = [*SAMPLE, "--reward-model", reward_model, "--length-ranges", "3,6"]
    assert main(scored) == 0
    results = json.loads((place / "e.json").read_text())
    assert results["metrics"].keys() == {
        "reward_model_score", "reward_model_win_rate_chosen", "rouge_l", "exact_match", "response_tokens",
        "response_words",
    }  # fmt: skip
    assert all(value["n"] == 24 for value in results["metrics"].values())  # duplicate prompts get one response
    assert "against" not in results
    assert results["reward_model"]["pairs"] == 25
    assert results["reward_model"]["accuracy"]["n"] == 24
    rows = load_prompts(results["responses"]["file"])
    assert rows.column_names == ["prompt", "response", "response_ended", "response_tokens"]
    assert results["metrics"]["response_tokens"]["mean"] == np.mean(rows["response_tokens"][:])
    model = RewardModel(reward_model)
    scores = model.score(rows["prompt"][:], rows["response"][:])
    assert results["metrics"]["reward_model_score"]["mean"] == pytest.approx(scores.mean())
    assert results["responses"]["points"] == [
        [n, pytest.approx(s, abs=1e-5)] for n, s in zip(rows["response_tokens"][:], scores, strict=True)
    ]
    assert {(row["low"], row["high"]) for row in results["by_length"]["rouge_l"]} == {(0, 3), (4, 6), (7, None)}
    assert "accuracy of longer is better" in capfd.readouterr().out
    before = (place / "e.generations.jsonl").stat().st_mtime_ns
    assert main(scored) == 0
    assert (place / "e.generations.jsonl").stat().st_mtime_ns == before
    assert main([*scored, "--seed", "1"]) == 2
    assert "holds work of another request" in stderr_of(capfd)


def refuse_system(model):
    """Make the chat template of a model refuse a system message."""
    template = Path(model) / "chat_template.jinja"
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template.write_text(refusal + template.read_text())


@pytest.fixture
def strict(place, reward_model):
    """A reward model that refuses the prompt of row 3."""
    shutil.copytree(reward_model, place / "strict")
    refuse_system(place / "strict")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    rows[3]["prompt"].insert(0, {"role": "system", "content": "> >"})
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--reward-model", "strict"]


def test_a_prompt_that_the_reward_model_refuses_is_an_error_before_sampling(place, strict, capfd):
    assert main([*SAMPLE, *strict]) == 2
    refusal = (
        "row 3: the chat template of the reward model strict refuses messages of system, user, assistant (no system)"
    )
    assert f"pairs.jsonl, {refusal}; choose another, or change the data" in stderr_of(capfd)
    assert not (place / "e.generations.jsonl").exists()
    assert main([*SAMPLE, "--generate"]) == 0
    (place / "e.json").unlink()
    assert main([*EVALUATE, "--generations", "e.generations.jsonl", *strict]) == 2
    assert f"e.generations.jsonl, {refusal}" in stderr_of(capfd)


@pytest.mark.parametrize(
    "limit", [[], ["--prompts", "3"]], ids=["the model refuses it too", "it is not among the prompts"]
)
def test_pairs_that_the_reward_model_refuses_are_dropped(place, strict, capfd, limit):
    if not limit:
        refuse_system("model")
    assert main([*SAMPLE, *strict, *limit]) == 0
    assert "reward model: dropped 1 row: the chat template refuses its messages (1, first row 3)" in stderr_of(capfd)
    results = json.loads((place / "e.json").read_text())
    rows, model = load_prompts("e.generations.jsonl"), RewardModel("strict")
    assert (results["reward_model"]["pairs"], len(rows)) == (24, 3 if limit else 23)
    chosen = references_of(load_prompts("pairs.jsonl"))
    prompts, texts = rows["prompt"][:], [chosen[prompt_text(prompt)] for prompt in rows["prompt"]]
    wins = pair_wins(model.score(prompts, rows["response"][:]), model.score(prompts, texts))
    assert results["metrics"]["reward_model_win_rate_chosen"]["mean"] == pytest.approx(wins.mean())


def test_sampling_statistics_are_reported_only_for_the_unchanged_file(place):
    assert main([*SAMPLE, "--generate"]) == 0
    command = [*EVALUATE, "--generations", "e.generations.jsonl"]
    for edited in (False, True):
        if edited:
            (place / "e.generations.jsonl").write_text((place / "e.generations.jsonl").read_text() + "\n")
        assert main(command) == 0
        results = json.loads((place / "e.json").read_text())["responses"]
        assert {"ended_share", "tokens_per_second"}.isdisjoint(results) == edited


def test_a_file_of_responses_needs_no_model_and_wins_half_against_itself(place, reward_model, capfd):
    assert main([*SAMPLE, "--generate"]) == 0
    command = [*EVALUATE, "--generations", "e.generations.jsonl", "--reward-model", reward_model]
    assert main([*command, "--against", "e.generations.jsonl"]) == 0
    results = json.loads((place / "e.json").read_text())
    assert results["metrics"]["reward_model_win_rate_against"]["mean"] == 0.5
    assert "rouge_l" not in results["metrics"]
    assert "reward_model" not in results
    assert main(command) == 0
    assert "no win rate" in stderr_of(capfd)
    assert not any("win_rate" in name for name in json.loads((place / "e.json").read_text())["metrics"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to evaluate: give --reference"),
        (["--model", "model"], "nothing to evaluate"),
        (["--generate", "--data", "pairs.jsonl"], "--model is required"),
        (["--generate", "--model", "model"], "--data is required"),
        (["--reward-model", "x", "--model", "model"], "--data is required"),
        (["--model", "model", "--data", "pairs.jsonl", "--generate", "--teacher", "t"], "--teacher needs --reference"),
        (["--model", "model", "--data", "pairs.jsonl", "--generate", "--against", "t"], "--against needs --reward-mod"),
        (["--model", "model", "--lm-eval", "x", "--length-ranges", "5"], "--length-ranges needs responses"),
        (["--model", "model", "--data", "pairs.jsonl", "--generate", "--limit", "5"], "--limit needs --lm-eval"),
        (["--generations", "pairs.jsonl", "--temperature", "0"], "--temperature needs responses to sample"),
        (["--generations", "pairs.jsonl", "--generate"], "use only one"),
        (["--generations", "pairs.jsonl"], "no column 'response'"),
        (
            ["--generations", "pairs.jsonl", "--length-ranges", "5,x"],
            "--length-ranges must be a valid integer, got 'x'",
        ),
        (["--generations", "pairs.jsonl", "--length-ranges", "10,5"], "length_ranges must rise, e.g. 5,10,50"),
        (["--generations", "pairs.jsonl", "--column", "chosen", "--reward-model", "model"], "it is a language model"),
    ],
)
def test_mistakes_are_errors(place, arguments, message, capfd):
    assert main([*EVALUATE, *arguments]) == 2
    assert message in stderr_of(capfd)
    assert not (place / "e.json").exists()
