"""The page: it stands alone, shows the numbers, escapes hostile text and takes whatever results.json holds."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prefdistill.evaluation.results import Role
from prefdistill.report import method_table, render_html, render_markdown, verdict
from support.runs import EVIL, NAN, Page, check_page, make_results, small, small_run, write_run


def test_page_stands_alone_and_is_accessible(page: str) -> None:
    parsed = check_page(page)
    assert len([a for a in parsed.all("svg") if a.get("class") == "plot"]) == 6 + 3 + 1 + 1 + 3 + 1 + 8
    assert "https://" not in page
    assert re.findall("http://[^\"' <]*", page) == []
    assert parsed.all("html") == [{"lang": "en"}]


def test_page_shows_the_numbers(page: str) -> None:
    text = Page(page).text
    assert "+0.039 ± 0.010" in text
    assert "−0.889 ± 0.060" in text
    assert "leans ahead" in text
    assert "0.657 ± 0.012" in text  # margin accuracy, text inside the figure
    assert "TVKD came out ahead of DPO by 0.039 ± 0.010 on true reward, T=1" in text
    assert "the shaping margin is correlated with length" in text
    assert "1 min 34 s" in text  # 3 x 31.2 s
    assert "1 of 3 reused" in text
    assert "tvkd: {alpha: 0.7, beta: 0.3}" in text
    assert "packages.trl 1.16.0" in text
    assert "9: the prompt leaves no room; 1: chosen and rejected are equal 0 31 7d6db3152625" in text
    assert "teacher-dpo, distill sft-chosen, distill dpo" in text  # they have read the same
    assert "pairs.jsonl source, margin" in text
    assert "In tokens: max_length 2,048." in text
    assert "Chat template of my/student , digest 0123456789ab" in text
    for heading in (
        "What was read",
        "Methods",
        "Difference to DPO",
        "Training",
        "Samples",
        "Time, memory, disk",
        "How to read this",
        "Provenance",
    ):
        assert f">{heading}</h2>" in page


def test_page_says_what_a_teacher_with_other_tokens_loses(tmp_path: Path) -> None:
    shares = {"shared": 0.9251, "taught": 0.9382, "exact": 0.9131, "start": 0.013, "unmapped": 0.0, "rest": 0.0739}
    results = small({"dckd": (0.1, 0.01, 3)})
    results["stages"] = [
        {"name": name, "kind": "distill", "method": name, "read": {"data": "train", "rows": 8, "across": across}}
        for name, across in (
            *(("dckd", shares), ("vanillakd", shares), ("other", shares | {"taught": NAN, "shared": NAN})),
            ("tvkd", {"shared": 0.5}),
        )
    ]
    path = small_run(tmp_path, results)
    said = (
        "for distill dckd, distill vanillakd: 93.8 % of the student's states are taught; of the teacher's mass there "
        "91.3 % is on a token of the same text, 1.3 % on the start of its text, 0.0 % on tokens without a place, 7.4 % "
        "outside the stored tokens."
    )
    for page in (Page(render_html([path])).text, render_markdown([path])):
        assert said in page
        assert (
            "The teacher's tokens share 92.5 % of the student's states, for distill dckd, distill vanillakd; "
            "50.0 % of the student's states, for distill tvkd."
        ) in page
        assert page.count("are taught") == 1


def test_figures_carry_their_numbers_in_words(page: str) -> None:
    forest = re.search(r'<desc id="run1-forest-alt">(.*?)</desc>', page)
    assert forest
    assert "tvkd +0.039 ± 0.010, 95 % interval -0.003 to 0.081" in forest[1]
    assert "Noise floor: 0.023" in forest[1]
    assert re.search(r'<desc id="run1-curve0-alt">loss by optimizer step. At the last step: .*tvkd 0\.\d+', page)


def test_figures_follow_the_theme_of_the_page(page: str) -> None:
    plots = re.findall(r'<svg class="plot".*?</svg>', page, re.DOTALL)
    assert plots
    for plot in plots:
        assert "currentColor" in plot
        colours = re.findall(r"(?:fill|stroke|color): (#\w+)", plot)
        assert colours == []  # every colour is the page's
        assert "<style" not in plot
        assert "<metadata" not in plot
        assert "DejaVu" not in plot
    assert "prefers-color-scheme: dark" in page


def test_styles_follow_roles() -> None:
    from prefdistill.report import svg

    roles = {"a": Role("teacher"), "b": Role("start"), "c": Role("baseline"), "d": Role(), "e": Role()}
    drawn = svg.styles(roles | {"f": Role("placebo", "e"), "g": Role("noise_floor", "c"), "h": Role("bound")}, "e")
    assert [name for name, style in drawn.items() if style.colour == svg.MUTED] == ["a", "b", "g"]
    assert (drawn["c"].colour, drawn["e"].colour) == (svg.INK, svg.BLUE)
    assert drawn["f"].colour == drawn["e"].colour
    assert len(set(drawn.values())) == len(drawn)


def test_rendering_is_repeatable_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib

    results = small({"tvkd": (0.1, 0.01, 3)})
    results["shaping"] = {"tvkd": {"points": [[0, 1], [1, 2], [2, 2]]}}
    path = small_run(tmp_path, results)
    with matplotlib.rc_context({"font.size": 40, "axes.titlecolor": "red"}):  # the reader's own settings do not matter
        before = dict(matplotlib.rcParams)
        page = render_html([path])
        assert dict(matplotlib.rcParams) == before
    assert render_html([path]) == page


def test_hostile_text_stays_text(evil_page: str) -> None:
    parsed = check_page(evil_page)
    assert "<script" not in evil_page
    assert evil_page.count("</style>") == 1
    assert parsed.text.count(" ".join(EVIL.split())) >= 12
    assert "\x00" not in evil_page
    assert "\x1b" not in evil_page


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 380])
def test_the_page_in_a_browser(evil_page: str, tmp_path: Path, open_page: Any, scheme: str, width: int) -> None:
    """No error, no dialog, no request (`open_page` sees to that), nothing wider than the window, and it can be read."""
    (tmp_path / "report.html").write_text(evil_page)
    page = open_page(tmp_path / "report.html", color_scheme=scheme, viewport={"width": width, "height": 900})
    page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = {name: sum(map(int, re.findall(r"\d+", colour)[:3])) for name, colour in (("ink", ink), ("paper", paper))}
    assert (light["ink"] < light["paper"]) is (scheme == "light")
    assert abs(light["ink"] - light["paper"]) > 450  # of 765
    assert page.locator("svg.plot").count() > 5


def test_not_finite_is_never_zero(evil_page: str) -> None:
    row = re.search(r'<tr class="method"><th scope="row">(?:(?!</code>).)*alert.*?</tr>', evil_page, re.DOTALL)
    assert row
    assert row[0].count('<span class="num bad">not finite</span>') == 3
    assert "0.000" not in row[0]
    assert "reward_t1, reward_greedy not finite" in evil_page
    assert "score not finite" in evil_page


@pytest.mark.parametrize("key", [k for k in make_results() if k != "methods"])
@pytest.mark.parametrize("value", ["missing", 7, "text", [1, None, {}], {"tvkd": 1, "x": [None]}])
def test_optional_parts_may_be_missing_or_malformed(tmp_path: Path, key: str, value: Any, monkeypatch: Any) -> None:
    from prefdistill.report import figures

    monkeypatch.setattr(figures, "svg", lambda *_, **__: "")  # 75 pages: the figures themselves are tested elsewhere
    results = make_results(seeds=1, orders=1)
    results["samples"] = results["samples"][:1]
    for other in ("margin_accuracy", "shaping"):
        results[other] = {"tvkd": {"mean": 0.5, "points": [[0, 1]]}}
    if value == "missing":
        del results[key]
    else:
        results[key] = value
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert "tvkd" in render_html([tmp_path])
    assert "tvkd" in render_markdown([tmp_path])
    assert method_table(results)
    assert verdict(results)


def test_smallest_run(tmp_path: Path) -> None:
    page = check_page(render_html([small_run(tmp_path)]))
    assert tmp_path.name in page.text
    assert "1.500" in page.text
    for absent in ("Training", "Samples", "Time", "warning", "Noise floor", "Difference to"):
        assert absent not in page.text


def test_figures_of_odd_numbers(tmp_path: Path) -> None:
    """One method, one step, identical points, an enormous interval: drawn without an error."""
    results = small({"tvkd": (1e9, 1e9, 2), "adpa": (0.0, 0.0, 3), "dckd": (NAN, NAN, 3), "$x_{$": (0.1, None, 1)})
    results["shaping"] = {"tvkd": {"points": [[1, 1]] * 5}}
    results["margin_accuracy"] = {"日本語 $\\frac": {"mean": 1.5, "se": NAN}}
    path = write_run(tmp_path / "odd", results, steps=5, names=("tvkd", "$x_{$"))
    check_page(render_html([path]))


def test_several_runs_on_one_page(tmp_path: Path) -> None:
    results, other = make_results(seeds=1, orders=1), make_results(seeds=1, orders=1, recipe="other")
    results["shaping"] = other["shaping"] = {}
    first = write_run(tmp_path / "first", results, steps=20, names=("dpo",))
    del other["methods"]["oracle-margin"]
    del other["metrics"]["length"]
    for scores in other["methods"].values():
        del scores["length"]
    second = write_run(tmp_path / "second", other, steps=20, names=("dpo",))
    html = render_html([first, second])
    page = check_page(html)
    assert "2 runs compared" in page.text
    captions = re.findall(r"<caption>(.*?)</caption>", html)
    assert captions == ["true reward, T=1", "true reward, greedy", "reward accuracy"]  # length is not shared
    table = html[html.index("<caption>true reward, T=1") :]
    oracle = re.search(r'<th scope="row"><code>oracle-margin</code></th>(.*?)</tr>', table, re.DOTALL)
    assert oracle
    assert oracle[1].count("<td>") == 2
    assert "–" in oracle[1]
    markdown = render_markdown([first, second])
    assert "| oracle-margin | 3.068 ± 0.170 (+0.038 ± 0.011) | – |" in markdown


def test_runs_of_the_same_name_show_their_paths(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text('{"recipe": "r", "methods": {"dpo": {"x": 1}}}')
        paths.append(tmp_path / name)
    text = check_page(render_html(paths)).text
    assert f"r ({tmp_path / 'a'})" in text
    assert f"r ({tmp_path / 'b'})" in text


def test_long_samples_are_cut_and_say_so(tmp_path: Path) -> None:
    results = {
        "methods": {f"m{i}": {"r": 1} for i in range(8)},
        "samples": [{"prompt": "p", "responses": {f"m{i}": "word " * 20_000 for i in range(8)}} for _ in range(40)],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    page = check_page(render_html([tmp_path]))
    assert "cut here: 100,000 characters in all" in page.text


def test_responses_by_length_on_the_page(page: str, run: Path) -> None:
    assert (
        "scores the better response higher in 0.710 ± 0.030 (95 % interval 0.652 to 0.769) of 625 held-out pairs"
        in (page.replace("\u00a0", " "))
    )
    for label in ("up to 5", "6 to 9", "10 and more"):
        assert page.count(label) >= 3  # the figure, its words, the table
    assert "200 responses of tvkd: score against length in tokens" in page
    text = render_markdown([run])
    assert "| true reward, T=1, by words of the reference | up to 5 | 6 to 9 | 10 and more |" in text
    assert "| tvkd | 3.069 ± 0.050 | 2.958 ± 0.050 | 2.847 ± 0.050 |" in text
    assert "900 MiB" in page
    assert "900 MiB" in text


def test_importing_the_report_is_cheap() -> None:
    code = (
        "import sys, prefdistill.report; "
        "print([m for m in ('matplotlib', 'jinja2', 'torch', 'numpy', 'yaml', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
