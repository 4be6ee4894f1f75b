"""The report page: what it says, that it needs nothing else, and that a browser shows it without an error."""

import configparser
import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from evaluation_wsdino.evaluate_profiles import evaluate_run
from evaluation_wsdino.pictures import draw_attention, draw_fields, save_sheet
from evaluation_wsdino.report import load_run, main, render_report, write_report
from wsdino.run_folder import RunFolder

EVIL = '<script>alert("x")</script>&\'"'
LONG = "N-(" + "methyl" * 60 + ")"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


def make_run(folder, seed=0, source="simulated, seed 7", moas=("Actin disruptors", "DNA damage", "Eg5 inhibitors")):
    """A finished run folder: 3 MOAs x 2 compounds x 2 doses in 2 weeks, two sets, logs and pictures."""
    rng = np.random.default_rng(seed)
    rows = []
    for week, plate in ((1, 1), (1, 2), (2, 1), (2, 2)):
        fields = [("B02", site, "DMSO", 0.0, "DMSO", "DMSO") for site in range(1, 7)]
        for m, moa in enumerate(moas):
            compound = f"{moa}-{week}"
            for d, dose in enumerate((0.1, 1.0)):
                fields += [(f"C{m}{d}", site, compound, dose, f"{compound}_{dose:g}", moa) for site in (1, 2)]
        rows += [(f"Week{week}_{plate}", f"Week{week}", *field) for field in fields]
    names = ("Plate", "Batch", "Well", "Site", "Compound", "Concentration", "Treatment", "MOA")
    metadata = pd.DataFrame(rows, columns=[f"Metadata_{name}" for name in names]).assign(Metadata_Source=source)
    (folder / "profiles").mkdir(parents=True)
    (folder / "pictures").mkdir()
    for name, signal in (("trained", 3.0), ("untrained", 0.5)):
        frame = metadata.copy()
        for channel in ("dna", "actin"):
            means = {moa: signal * rng.normal(size=5) for moa in moas} | {"DMSO": np.zeros(5)}
            values = np.stack([means[moa] for moa in frame["Metadata_MOA"]]) + rng.normal(size=(len(frame), 5))
            frame[[f"{channel}_{index:04d}" for index in range(5)]] = values
        frame.to_parquet(folder / "profiles" / f"{name}.parquet")
    monitors = {"lr": 1e-4, "teacher_entropy": 2.0, "mean_entropy": 3.0, "kl": 0.4, "participation_ratio": 3.5}
    for channel in ("dna", "actin"):
        lines = []
        for step in range(40):
            line = {"step": step, "epoch": step / 10}
            lines.append(line | monitors | {"loss": 4 - step / 20, "images_per_second": 12.0})
            if step % 10 == 9:
                lines.append(line | {"nsc": 0.5, "nscb": 0.25 + step / 100})
        (folder / channel).mkdir()
        (folder / channel / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        for kind in ("attention", "fields"):
            picture = rng.integers(0, 255, size=(40, 60), dtype=np.uint8)
            Image.fromarray(picture).save(folder / "pictures" / f"{kind}_{channel}.png")
    settings = {"arguments": {"seed": seed, "num_prototypes": 64}, "dataset": {}, "git": "abc1234"}
    (folder / "settings.json").write_text(json.dumps(settings))
    evaluate_run(folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [make_run(root / "first"), make_run(root / "second", seed=1)]


class Page(html.parser.HTMLParser):
    """Texts, attributes and the stack of open elements; raises on a wrongly closed one."""

    VOID = {"meta", "img", "br", "input", "line", "path", "rect", "circle", "polyline"}

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.links, self.scripts = [], [], [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.links += [(tag, key, value) for key, value in attributes if key in ("src", "href", "action", "srcset")]
        assert not any(key.startswith("on") for key, _ in attributes)
        if tag not in self.VOID or tag in ("line", "path", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> inside {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page_of(*folders, **options):
    """The page about run folders or loaded runs."""
    loaded = [one if hasattr(one, "results") else load_run(one, thumbnails=False) for one in folders]
    return Page(render_report(loaded, **options))


def test_the_page_says_what_results_json_holds_and_each_score_once(runs):
    path = write_report([runs[0]])
    assert path == runs[0] / "report.html" and not list(runs[0].glob("*.partial"))
    page = Page(path.read_text())
    results = json.loads((runs[0] / "results.json").read_text())
    for name in ("trained", "untrained"):
        for prefix in ("nsc", "nscb"):
            scores = results["sets"][name]
            low, high = scores[f"{prefix}_bootstrap"]
            words = f"{100 * scores[prefix]:.1f} % ({scores[f'{prefix}_correct']}/{scores[f'{prefix}_total']})"
            assert f"{words} {100 * low:.0f}–{100 * high:.0f} % chance" in page.text
    start = page.text[: page.text.index("Each channel alone")]
    assert start.count("trained network") == start.count("untrained network of the same shape") + 1 == 2
    for words in ("SIMULATED DATA", "best epoch chosen on test labels", "healthy", "abc1234", "t-SNE", "per second"):
        assert words in page.text
    for treatment in results["sets"]["trained"]["treatments"]:
        assert treatment in page.text
    pictures = [value for tag, key, value in page.links if tag == "img" and value.startswith("data:image/")]
    assert len(pictures) == 4


def test_the_page_asks_for_nothing_outside_itself(runs):
    for folders in (runs[:1], runs):
        text = render_report([load_run(folder, thumbnails=False) for folder in folders])
        page = Page(text)
        assert all(value.startswith(("#", "data:image/")) for _, _, value in page.links)
        assert not re.search(r"https?://|@import|url\(", text)
        anchors = {value[1:] for tag, _, value in page.links if tag == "a"}
        assert len(anchors) == 9 and all(f'<h2 id="{name}">' in text for name in anchors)
        assert "default-src 'none'" in text


def test_several_runs_are_compared_and_folded_where_they_are_many(runs):
    for count in (2, 3):
        loaded = [load_run(folder, thumbnails=False) for folder in (*runs, runs[1])[:count]]
        for run, name in zip(loaded, ("first", "second", "third"), strict=False):
            run.name = name
        text = render_report(loaded)
        words = Page(text).text
        assert ("third against first" in words) == (count == 3) and "second against first not told apart" in words
        assert "first: trained against untrained" in words and "all runs: mean ± SD" in words
        for name in ("first: untrained", "second: untrained", "first: NSC", "second: NSCB"):
            assert name in words
        folded = [text.split("</summary>")[0] for text in text.split("<details><summary>")[1:]]
        assert len(folded) == (2 + 4 + 2 if count == 3 else 3), folded


def test_epochs_of_seeds_and_of_all_channels_together(runs):
    """The window's means, and the best epoch, by hand: NSCB was logged as 0.25 + step / 100 at epochs 0.9 ... 3.9."""
    loaded = [load_run(folder, thumbnails=False) for folder in runs]
    for run, scores in zip(loaded, ((0.1, 0.6, 0.4), (0.3, 0.2, 0.8)), strict=True):
        run.metrics["all channels"] = [
            {"step": 10 * e, "epoch": e, "nsc": 0.9, "nscb": s} for e, s in zip((1, 3, 4), scores, strict=True)
        ]
    text = page_of(*loaded, window=(3, 4)).text
    # Means over epochs 3 and 4 are 0.5 and 0.5, the best of the first 60 % at 3 and of the second 80 % at 4.
    best = "best epoch chosen on test labels"
    assert f"all channels, first 40.0 % at 4 50.0 % epochs 3 to 4 60.0 % at 3 {best}" in text
    assert f"all channels, second 80.0 % at 4 50.0 % epochs 3 to 4 80.0 % at 4 {best}" in text
    assert "all channels, all runs: mean ± SD 50.0 % ± 0" in text
    # One channel: in the window epoch 3.9 alone, step 39.
    assert "dna, first 64.0 % at 3.9 64.0 % epochs 3 to 4 64.0 % at 3.9" in text
    # Without a window it is the last quarter of what every run of that channel reached.
    text = page_of(*loaded).text
    assert "all channels, first 40.0 % at 4 50.0 % epochs 3 to 4" in text
    assert "dna, first 64.0 % at 3.9 64.0 % epochs 2.92 to 3.9" in text


def test_runs_scored_by_different_protocols_are_not_compared_in_silence(runs):
    loaded = [load_run(folder, thumbnails=False) for folder in runs]
    assert "scored differently" not in page_of(*loaded).text
    loaded[1].results["protocol"]["batch_rule"] = "disjoint"
    assert "The runs were scored differently (batch_rule: median, disjoint)" in page_of(*loaded).text


def test_words_follow_the_protocol(runs):
    """Another plate of the same batch is not another batch, and the vote of five is not the nearest one."""
    run = load_run(runs[0], thumbnails=False)
    plain = page_of(run).text
    assert "in other batches" in plain and "other compound and batch (NSCB)" in plain
    run.results["protocol"] |= {"batch_rule": "plate", "k": 5}
    query = run.scores["nsc_queries"][0]
    query |= {"neighbours": [query["neighbour"], 1, 2], "predicted": "DNA damage"}
    text = page_of(run).text
    assert "on other plates, which may belong to the same batch" in text and "compound and plate (NSCB)" in text
    assert "in other batches" not in text and "the vote of the 5 nearest neighbours" in text
    assert "the vote of the 5 most similar treatments" in text and "vote: DNA damage" in text


def test_files_of_earlier_versions_are_read_under_present_names(tmp_path):
    folder = make_run(tmp_path / "old")
    (folder / "profiles" / "untrained.parquet").rename(folder / "profiles" / "count.parquet")
    settings = {"arguments": {"epochs": 24, "batch_size": 32}, "dataset": {"part": "annotated"}}
    (folder / "settings.json").write_text(json.dumps(settings))
    evaluate_run(folder, progress=False)
    results = RunFolder(folder).results()
    assert set(results["sets"]) == {"trained", "nuclei"} and results["comparisons"][0]["first"] == "nuclei"
    assert results["settings"]["arguments"] == {"num_train_epochs": 24, "per_device_train_batch_size": 32}
    assert results["settings"]["dataset"] == {"subset": "annotated"}
    assert RunFolder(folder).metrics("dna")[0]["pairs_per_second"] == 12.0
    text = page_of(folder).text
    assert "trained against nuclei" in text and "nuclei nuclei counted" in text


def test_a_score_that_is_not_a_number_is_no_point_of_a_curve(tmp_path):
    """For a screen of a single batch, which has no NSCB, training logs NaN."""
    folder = make_run(tmp_path / "run")
    log = folder / "dna" / "metrics.jsonl"
    log.write_text(re.sub(r'"nscb": [0-9.]+', '"nscb": NaN', log.read_text()))
    text = page_of(folder).text
    assert "dna" in text and "nan" not in text.lower().split()


def test_numbers_do_not_part_from_their_per_cent_sign(runs):
    text = render_report([load_run(folder, thumbnails=False) for folder in runs])
    assert not re.search(r"\d %", re.sub(r"<(title|style|script)\b.*?</\1>", "", text, flags=re.DOTALL))


def test_hostile_names_are_text_wherever_they_stand(tmp_path):
    """Markup, quotes, control characters, right-to-left and very long names, of everything that data name."""
    moas = (EVIL, "</style></script><svg onload=alert(1)>", f"‮阻害剤 {LONG}")
    folder = make_run(tmp_path / "a&<b>", moas=moas, source='simulated, "><b>')
    settings = {EVIL: EVIL, "arguments": {"name": "</script><b>"}, "dataset": {"path": "x<img src=y onerror=z>"}}
    (folder / "settings.json").write_text(json.dumps(settings))
    log = folder / "dna" / "metrics.jsonl"
    log.write_text(log.read_text() + json.dumps({"step": 40, "loss": float("nan"), EVIL: EVIL}) + "\n")
    titles = [EVIL, "a\x00b", "]]><!--", LONG]
    fields = [np.full((20, 30), 0.5)] * 4
    save_sheet(draw_fields(fields, titles, width=40), folder / "pictures" / "fields_dna.png")
    save_sheet(
        draw_attention(np.stack(fields), np.ones((4, 1, 2, 3)), np.ones((4, 2, 3), bool), titles, width=40),
        folder / "pictures" / "attention_<b>bold.png",
    )
    evaluate_run(folder, progress=False)
    text = write_report([folder]).read_text()
    page = Page(text)
    assert page.scripts == 1 and text.count("</script") == 1 and text.count("<!--") == 0
    for name in (*moas, EVIL, LONG, "]]><!--", "</script><b>", "x<img src=y onerror=z>", "a&<b>", "<b>bold"):
        assert " ".join(name.split()) in page.text, name
    pictures = [value for tag, key, value in page.links if tag == "img"]
    assert len(pictures) == 4 + 4 * 4 + 3 and all(value.startswith("data:image/") for value in pictures)


def test_a_headline_that_is_no_trained_network_is_not_called_one(tmp_path):
    folder = make_run(tmp_path / "imagenet")
    assert "as training left it" in page_of(folder).text
    (folder / "profiles" / "trained.parquet").unlink()
    evaluate_run(folder, progress=False)
    text = page_of(folder).text
    assert "untrained network" in text and "as training left it" not in text


def test_a_run_of_real_data_without_logs_pictures_or_settings(tmp_path):
    folder = make_run(tmp_path / "bare", source="BBBC021v1")
    for name in ("dna", "actin", "pictures"):
        shutil.rmtree(folder / name)
    (folder / "settings.json").unlink()
    evaluate_run(folder, progress=False)
    page = Page(write_report([folder]).read_text())
    assert "Did training go well" not in page.text and "What the network sees" not in page.text
    assert "simulated" not in page.text.lower()


def test_held_out_compounds_are_summed_over_runs_and_notes_are_shown(runs):
    loaded = [load_run(folder, thumbnails=False) for folder in runs]
    for run, compound, right in zip(loaded, ("AZ-C", "taxol"), (2, 1), strict=True):
        counts = {"nsc_correct": right, "nsc_total": 3, "nscb_correct": 0, "nscb_total": 0}
        run.scores["held_out"] = {"compounds": [compound]} | counts
        run.results["notes"] = ["Training saw the MOA."]
    text = page_of(*loaded).text
    assert "first: AZ-C 2/3 0/0" in text and "all runs together 50.0 % (3/6) no query" in text
    assert "second: Training saw the MOA." in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / place / "demo") for place in ("x", "y")]
    output = write_report(folders, tmp_path / "both.html")
    assert str(folders[1]) in Page(output.read_text()).text


def test_thumbnails_from_a_built_dataset(runs, tiny_screen):
    import datasets

    table = datasets.load_dataset(str(tiny_screen), "annotated", split="train")
    run = load_run(runs[0], tiny_screen)
    assert set(run.thumbnails) == set(table["treatment"])
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in run.thumbnails.values())
    name = run.scores["treatments"][0]
    run.thumbnails[name] = next(iter(run.thumbnails.values()))
    assert run.thumbnails[name] in [value for tag, _, value in page_of(run).links if tag == "img"]


def test_the_command_and_bad_input(runs, tmp_path, capsys):
    page = tmp_path / "page.html"
    main([str(runs[0]), "--output", str(page), "--no_thumbnails", "--window", "0.5", "2"])
    assert "page.html" in capsys.readouterr().out
    # NSCB was logged at epochs 0.9, 1.9, 2.9 and 3.9 as 0.25 + step / 100: of the window's two the mean is 0.39.
    assert "39.0 % epochs 0.5 to 2" in Page(page.read_text()).text
    page.unlink()
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").write_text("")

    def error(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        text = capsys.readouterr().err
        assert stopped.value.code == 2 and text.count("\n") == 1 and text.startswith("wsdino-report: error: ")
        assert not list(tmp_path.rglob("*.html")) and not list(tmp_path.rglob("*.partial"))
        return text

    assert "--window" in error(runs[0], "--output", page, "--window", 3, 1)
    assert "absent" in error(tmp_path / "absent")
    assert "wsdino-evaluate" in error(empty)
    for content in ("{", "[]", '{"format": 1, "sets": {"a": 1}}', '{"format": 99}'):
        (empty / "results.json").write_text(content)
        assert "results.json" in error(empty)
    results = json.loads((runs[0] / "results.json").read_text())
    del results["sets"]["trained"]["nscb_confusion"]
    (empty / "results.json").write_text(json.dumps(results))
    assert "nscb_confusion" in error(empty)
    assert "--dataset /nowhere" in error(runs[0], "--output", page, "--dataset", "/nowhere")
    assert "empty is not a built dataset" in error(runs[0], "--output", page, "--dataset", empty)
    assert "file" in error(runs[0], "--output", tmp_path / "file" / "page.html", "--no_thumbnails")


# ---------------------------------------------------------------- in a browser


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_errors_and_without_sideways_scrolling(runs, tmp_path, width):
    hostile = make_run(tmp_path / "hostile", moas=(EVIL, LONG, "</style></script><svg onload=alert(1)>"))
    page = write_report([*runs, hostile], tmp_path / "page.html", thumbnails=False)
    # The probe stands in a frame of the wanted width, since a headless window has a least width of its own.
    probe = tmp_path / "probe.html"
    content = html.escape(page.read_text())
    probe.write_text(
        f'<iframe id=f style="width:{width}px;height:900px;border:0" srcdoc="{content}"></iframe>'
        """<script>
        f.addEventListener("load", function () {
          var d = f.contentDocument, w = f.contentWindow, one = s => d.querySelector(s);
          one('button[data-colour=batch]').click();
          d.querySelectorAll('.filter button[data-show=miss]').forEach(button => button.click());
          var mark = one('[data-layer=batch] .mark');
          mark.dispatchEvent(new w.PointerEvent("pointermove", {bubbles: true, clientX: 5, clientY: 5}));
          document.body.setAttribute("data-result", JSON.stringify({
            wide: d.documentElement.scrollWidth,
            layers: [one('[data-layer=batch]').style.display, one('[data-layer=moa]').style.display],
            left: Array.from(d.querySelectorAll('.neighbours tbody tr')).filter(r => !r.hidden).length,
            missed: d.querySelectorAll('.neighbours tbody tr:not([data-miss="0"])').length,
            tip: d.getElementById("tip").textContent}));
        });
        </script>"""
    )
    flags = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync --enable-logging=stderr --v=0").split()  # fmt: skip
    flags += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=5000", "--dump-dom", probe.as_uri()]
    done = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=120)
    result = json.loads(html.unescape(re.search(r'data-result="([^"]+)"', done.stdout).group(1)))
    assert result["wide"] <= width and result["layers"] == ["", "none"]
    assert result["left"] == result["missed"] < 36 and "Week" in result["tip"]
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []


def test_templates_style_and_script_are_shipped():
    root = Path(__file__).parents[1]
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    shipped = setup["options.package_data"]["evaluation_wsdino.report"]
    for path in (root / "evaluation_wsdino" / "report").iterdir():
        assert path.suffix in (".py", "") or f"*{path.suffix}" in shipped
