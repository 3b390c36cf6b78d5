"""The report of a run: what it shows is what the run wrote, nothing in it can run, and a browser shows it on a phone."""

import json
import re
from html.parser import HTMLParser

import pytest
from browser import find_browser, look_at
from click.testing import CliRunner
from helpers import EXAM_STYLE, read_metrics, run, write_jsonl

from medtrain.trainer.cli import main
from medtrain.trainer.run import report
from medtrain.trainer.run.report_charts import chart, series
from medtrain.trainer.run.report_exam import share
from medtrain.trainer.train import loop

EVIL = "<script>document.title='run'</script>\"'><img src=x onerror=alert(1)> 薬 は 熱 & 咳"


class Page(HTMLParser):
    """Elements with their attributes, and the text that a reader sees."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.words, self.inside = [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = [*self.inside, tag] if tag in ("script", "style") else self.inside

    def handle_endtag(self, tag):
        self.inside = self.inside[:-1] if tag in ("script", "style") else self.inside

    def handle_data(self, data):
        if not self.inside:
            self.words.append(data)

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def charts(self):
        """Labels of the charts that are drawn."""
        return [plot["aria-label"].split(" over steps")[0] for plot in self.all("div") if plot.get("role") == "img"]


def page_of(run_dir):
    return Page((run_dir / "report.html").read_text(encoding="utf-8"))


@pytest.fixture
def exam(tmp_path):
    rows = [
        {"problem_id": str(i), "problem_text": text, "choices": ["熱", "咳"], "answer": ["ab"[i % 2]], "points": str(1 + i)}
        for i, text in enumerate(["熱 の 薬 は", "病 は", EVIL])
    ]
    return write_jsonl(tmp_path / "exam.jsonl", rows)


@pytest.fixture
def rpo_run(rpo_tree, exam, tmp_path):
    rows = rpo_tree["data"]["pairs"][0]["path"]
    rpo_tree["data"] |= {"exam": str(exam), "heldout": [{"path": rows, "name": "held & <b>out</b>"}]}
    style = tmp_path / "style.yaml"
    style.write_text(json.dumps(EXAM_STYLE))  # JSON is YAML too
    rpo_tree["eval"] = {"every": 3, "exam_every": 3, "exam_max_new_tokens": 9, "exam_prompt": str(style)}
    return run("rpo", rpo_tree, tmp_path / "rpo run").run_dir


def test_the_page_shows_what_the_run_wrote(rpo_run):
    page, rows = page_of(rpo_run), read_metrics(rpo_run)
    assert {
        "Loss",
        "Reward margin, chosen − rejected",
        "Reward accuracy",
        "Rewards",
        "Log-probabilities, nats per completion",
        "Loss terms",
        "Gradient norm",
        "Learning rate",
        "Share of points",
        "Explanation gap",
    } <= set(page.charts)
    assert "Held-out bits per byte" not in page.charts and "MFU" not in page.charts
    assert f"{rows[1]['loss']:.4g} → {rows[-1]['loss']:.4g}" in page.text
    held = [row["heldout/rewards/margin"] for row in rows if "heldout/rewards/margin" in row]
    assert f"reward margin {held[0]:.4g} → {held[-1]:.4g} held-out, steps 0 and 6" in page.text
    for step, row in ((0, rows[0]), (6, rows[-1])):
        assert re.search(rf"step {step} with explanation {row['exam/explain/points_ratio']:.3f} \[[\d.]+, [\d.]+\]", page.text)
    assert "finished" in page.text and "reasoning preference optimization" in page.text
    assert '"optim.batch_pairs"' not in page.text and "optim.batch_pairs 8" in page.text
    assert "pairs 24 24 0 0" in page.text  # the ledger
    last = [json.loads(line) for line in (rpo_run / "exam" / "step-00000006.jsonl").read_text("utf-8").splitlines()]
    outputs = [row["output"].strip() for row in last if row["mode"] == "explain"]
    assert all(" ".join(output.split()) in page.text for output in outputs)


def test_nothing_from_the_run_is_markup_and_nothing_is_fetched(rpo_run):
    page = page_of(rpo_run)
    assert not page.all("script") and not page.all("img") and not page.all("b")
    assert " ".join(EVIL.split()) in page.text and "held & <b>out</b>" in page.text
    linked = [attributes[name] for _, attributes in page.elements for name in ("src", "href") if name in attributes]
    assert [address for address in linked if not address.startswith("#")] == ["data:,"]


def test_parts_that_are_missing_are_left_out(cpt_tree, tmp_path):
    result = run("cpt", cpt_tree, tmp_path / "cpt")
    page = page_of(result.run_dir)
    for heading in ("Exam", "Explanations before and after", "Preferences", "Held-out bits per byte"):
        assert heading not in page.text
    assert "Loss" in page.charts and "continued pretraining" in page.text
    for name in ("ledger.json", "tensorboard"):  # as of another machine, copied in part
        path = result.run_dir / name
        path.unlink() if path.is_file() else None
    result = CliRunner().invoke(main, ["report", str(result.run_dir)])
    assert result.exit_code == 0 and result.output.strip().endswith("report.html")
    assert "Data" not in [word for word in page_of(tmp_path / "cpt").words if word == "Data"]


def test_a_run_that_is_stopped_says_so_and_a_report_never_stops_a_run(cpt_tree, tmp_path, monkeypatch):
    steps = loop.optimizer_step

    def failing(policy, data, loss, optimizer, step, *args, **more):
        if step == 3:
            raise RuntimeError("step 4: loss nan: not finite")
        return steps(policy, data, loss, optimizer, step, *args, **more)

    monkeypatch.setattr(loop, "optimizer_step", failing)
    with pytest.raises(RuntimeError):
        run("cpt", cpt_tree, tmp_path / "run")
    assert "stopped: step 4: loss nan: not finite" in page_of(tmp_path / "run").text
    monkeypatch.setattr(loop, "optimizer_step", steps)

    def broken(run):
        raise ZeroDivisionError

    monkeypatch.setattr(report, "_page", broken)
    result = run("cpt", cpt_tree, tmp_path / "run")
    assert result.model_dir.is_dir() and result.metrics["step"] == 6


def test_a_report_takes_little_of_a_long_run(rpo_run, monkeypatch):
    now, written = [0.0], []

    def slow(out, *, stopped):
        now[0] += 2.0
        written.append(stopped)

    monkeypatch.setattr(report, "write_report", slow)
    monkeypatch.setattr(report.time, "monotonic", lambda: now[0])
    live = report.LiveReport(rpo_run, enabled=True)
    for _ in range(1000):
        now[0] += 1.0
        live.refresh()
    assert 10 <= len(written) <= 11
    live.write("stopped")
    assert written[-1] == "stopped", "the last one is always written"


def test_a_falling_likelihood_is_told_on_the_page(rpo_run):
    rows = read_metrics(rpo_run)
    falling = [rows[1] | {"step": step, "rewards/chosen": -step, "rewards/margin": 2.0 * step} for step in range(1, 31)]
    (rpo_run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in falling), encoding="utf-8")
    report.write_report(rpo_run)
    text = page_of(rpo_run).text
    assert text.count("the chosen answers grow less likely while their margin grows") == 1
    assert "warnings" in text and "over the last 10 steps to step" in text


def test_what_is_no_run_is_refused(tmp_path):
    for path, words in ((tmp_path / "nowhere", "no run folder"), (tmp_path, "no run folder")):
        result = CliRunner().invoke(main, ["report", str(path)])
        assert result.exit_code == 2 and words in result.stderr and len(result.stderr.splitlines()) == 1
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("no json\n")
    result = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "not a run that can be read" in result.stderr


def test_the_results_of_an_eval_folder_stand_in_the_table(rpo_run, tmp_path):
    one = {"points": 3, "max_points": 6, "points_ratio": 0.5, "parse_failures": 1, "truncated": 2}
    result = {"answer": one | {"points_ratio_low": 0.25, "points_ratio_high": 0.75}, "explain": one, "explanation_gap": 0.0}
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "exam.json").write_text(json.dumps(result))
    assert CliRunner().invoke(main, ["report", str(rpo_run), "--exam", str(tmp_path / "final")]).exit_code == 0
    assert "eval: final answer only 0.500 [0.250, 0.750] 3 of 6 2 1" in page_of(rpo_run).text
    assert CliRunner().invoke(main, ["report", str(rpo_run), "--exam", str(tmp_path / "no")]).exit_code == 2


def test_the_interval_of_points_is_that_of_the_binomial_where_every_question_counts_one():
    rows = [{"points": 1, "correct": i % 4 == 0} for i in range(400)]
    low, high = share(rows)[1:]
    half = 1.96 * (0.25 * 0.75 / 400) ** 0.5
    assert low == pytest.approx(0.25 - half, abs=0.01) and high == pytest.approx(0.25 + half, abs=0.01)
    # Paired: the same questions right both ways leave nothing to chance.
    assert share(rows, rows) == (0.0, 0.0, 0.0)
    heavy = [{"points": 9, "correct": True}, *[{"points": 1, "correct": False}] * 9]
    assert share(heavy)[2] > 0.7


def test_charts_keep_every_extreme_and_leave_out_what_is_no_number():
    rows = [{"step": i, "x": 5.0 if i == 777 else 1.0} for i in range(1000)] + [{"step": 1000, "x": None}]
    rows += [{"step": 1001, "x": float("nan")}]
    line = series("x", rows, "x")
    assert len(line.values) == 200 and max(line.high) == 5.0
    assert chart("t", [series("y", rows, "y")]) is None
    drawn = chart("t", [series("<i>", [{"step": 0, "x": 1.0}, {"step": 4, "x": 3.0}], "x")])
    assert drawn["caption"] == "<i> 1 → 3" and "<i>" not in drawn["svg"]
    x0, y0, x1, y1 = map(
        float, re.search(r'd="M (\S+) (\S+)\s*L (\S+) (\S+)\s*" clip[^>]*stroke: #2f81f7', drawn["svg"]).groups()
    )
    assert x0 < x1 and y0 > y1, "later is further right, more is higher up"


@pytest.mark.skipif(find_browser() is None, reason="no Chromium on PATH and no MEDTRAIN_BROWSER")
@pytest.mark.parametrize(("width", "dark"), [(375, False), (375, True), (1280, False)])
def test_a_browser_shows_it_without_a_complaint(rpo_run, tmp_path, width, dark):
    ask = """(() => {
        const small = [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height);
        return {title: document.title, text: Math.min(...small),
                background: getComputedStyle(document.body).backgroundColor};
    })()"""
    sight = look_at(rpo_run / "report.html", tmp_path, width=width, dark=dark, ask=ask)
    assert sight.problems == []
    assert [address for address in sight.requests if not address.startswith("data:")] == [
        (rpo_run / "report.html").resolve().as_uri()
    ]
    assert sight.width == width, "nothing sticks out to the side"
    assert sight.found["title"] == "rpo run – medtrain", "the question's script did not run"
    assert sight.found["text"] >= 9
    assert (sight.found["background"] == "rgb(246, 247, 249)") != dark
    assert len(sight.png) > 30_000, "not an empty page"
