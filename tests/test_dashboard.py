"""What Prometheus reads, and what a browser shows while the model generates."""

import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest
from prometheus_client.parser import text_string_to_metric_families

import mlx_od_moe
from checkpoints import model_directory
from mlx_od_moe.serve_command import expected_recall
from servers import PROMPT, ask, client, eventually, make_bundle, serving

RECALL = (0.5, 0.4, 0.3, 0.2)
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
)


@pytest.fixture(scope="module")
def server():
    model, tokenizer, runtime = mlx_od_moe.load(
        model_directory("nano-moe"), make_bundle(), "25%", disk="60MB/s,200us", guarded=False
    )
    with runtime, serving((model, tokenizer, runtime), expected_recall=RECALL) as server:
        yield server


@pytest.fixture
def generating(server):
    """While an answer is generated, some seconds of it."""
    asked = {"model": "nano-moe", "prompt": PROMPT, "max_tokens": 900, "stream": True}
    stream = client(server).completions.create(**asked)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(lambda: sum(1 for _ in stream))
        eventually(lambda: len([s for s in server.monitor.page()["series"] if s["recall"]]) > 1)
        assert not read.done()
        yield server
        stream.close()


class Page(HTMLParser):
    """The texts of a page's elements by id; the cells of a table row by row."""

    def __init__(self, html: str):
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.texts: dict[str, str] = {}
        self.points: list[str] = []
        self._table = self._id = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "table":
            self._table = given["id"]
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag in ("td", "th"):
            self.rows[self._table][-1].append("")
        elif tag == "polyline":
            self.points.append(given["points"])
        self._id = given.get("id", "") if tag not in ("table", "tr", "td", "th") else "cell"

    def handle_data(self, data):
        if self._id == "cell" and self.rows[self._table]:
            self.rows[self._table][-1][-1] += data
        elif self._id:
            self.texts[self._id] = self.texts.get(self._id, "") + data

    def handle_endtag(self, tag):
        self._id = ""


@pytest.mark.skipif(CHROMIUM is None, reason="Debian's package chromium is not installed")
def test_a_browser_shows_a_running_model(generating, tmp_path):
    address = f"http://127.0.0.1:{generating.port}/dashboard"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path}", "--virtual-time-budget=2500"]
    run = subprocess.run([*command, "--dump-dom", address], capture_output=True, timeout=60)
    page, now = Page(run.stdout.decode()), generating.monitor.page()
    assert page.texts["model"] == "nano-moe"
    assert page.texts["state"].startswith("up ")
    assert float(page.texts["tokens-per-second"]) > 0
    assert 0 < float(page.texts["hit-rate"]) < 100
    assert page.texts["requests"] == "1 of 20"
    assert 0 < int(page.texts["tokens"].replace(",", "")) <= now["tokens"]
    layers = [str(layer) for layer in range(8)]
    head, hits = page.rows["hits"]
    assert head[1:] == layers
    for shown, known in zip(hits[1:], now["layers"], strict=True):
        assert abs(float(shown) - 100 * known["hit_rate"]) < 15
    head, *recalls = page.rows["recall"]
    assert head[1:] == layers
    assert [row[0] for row in recalls] == [f"{d} ahead" for d in (1, 2, 3, 4)]
    for d, row in enumerate(recalls, 1):
        # The first layers are too early to have been predicted from so far before.
        assert [text == "–" for text in row[1:]] == [layer < d for layer in range(8)]
    _, promised, realised = page.rows["drift"]
    assert promised == ["promised", "50.0", "40.0", "30.0", "20.0"]
    assert all(0 <= float(text) <= 100 for text in realised[1:])
    rates, hit_rate, recall, expected = page.points
    assert all(len(points.split()) > 1 for points in (rates, hit_rate, recall))
    assert {point.split(",")[1] for point in expected.split()} == {"64.4"}  # of 98 … 2: .35


def test_the_page_needs_nothing_from_elsewhere(server):
    answer = ask(server, "GET", "/dashboard")
    html = answer.read().decode()
    assert not re.search(r"(src|href)\s*=|@import|url\(|https?://(?!www\.w3\.org/2000/svg)", html)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]


def metrics(server) -> dict[tuple, float]:
    text = ask(server, "GET", "/metrics").read().decode()
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_are_the_counts_of_the_runtime(server):
    eventually(lambda: len(server.runs) == 0)
    before = metrics(server)
    asked = {"model": "nano-moe", "prompt": "It was a dark night", "max_tokens": 5}
    client(server).completions.create(**asked)
    eventually(lambda: len(server.runs) == 0)
    found, report = metrics(server), server.monitor._runtime.report()
    tokens = ("mlx_od_moe_tokens_total", ("kind", "generated"))
    assert found[tokens] - before[tokens] == 5
    done = ("mlx_od_moe_requests_total", ("path", "/v1/completions"), ("status", "200"))
    assert found[done] - before.get(done, 0) == 1
    for layer, counts in report["store"]["layers"].items():
        at = ("layer", str(layer))
        for name in ("lookups", "hits", "late", "misses", "wasted_bytes"):
            assert found[f"mlx_od_moe_store_{name}_total", at] == counts[name]
        read = ("mlx_od_moe_store_read_bytes_total", ("cause", "demand"), at)
        assert found[read] == counts["demand_bytes"]
        stall = found["mlx_od_moe_store_stall_seconds_total", at]
        assert stall == pytest.approx(counts["stall_ns"] / 1e9)
    own = text_string_to_metric_families(server.monitor._runtime.store.prometheus())
    for sample in (sample for family in own for sample in family.samples):
        assert found[(sample.name, *sorted(sample.labels.items()))] == sample.value
    assert found[("mlx_od_moe_hit_rate",)] == report["hit_rate"]
    assert found[("mlx_od_moe_tokens_per_second",)] == report["tokens_per_second"] > 0
    for d, expected in enumerate(RECALL, 1):
        at = ("distance", str(d))
        assert found["mlx_od_moe_prediction_recall_expected", at] == expected
        assert found["mlx_od_moe_prediction_recall", at] == report["prediction"]["recall_at_k"][d]
        named, chosen = (
            sum(
                v
                for k, v in found.items()
                if k[0] == f"mlx_od_moe_prediction_{n}_total" and at in k
            )
            for n in ("named", "chosen")
        )
        assert named / chosen == report["prediction"]["recall_at_k"][d]


def test_metrics_in_openmetrics_format(server):
    answer = ask(server, "GET", "/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
    assert answer.read().endswith(b"# EOF\n")


def test_a_client_that_asks_for_nothing_known_makes_no_new_metric(server):
    for i in range(3):
        assert ask(server, "GET", f"/unknown/{i}").status == 404
    paths = {dict(key[1:]).get("path") for key in metrics(server)}
    assert "other" in paths
    assert not [path for path in paths if path and "unknown" in path]


def test_the_page_before_anything_happened(server):
    assert json.loads(ask(server, "GET", "/dashboard/data").read())["model"] == "nano-moe"


def test_what_validation_promised_is_read_from_the_predictor(tmp_path):
    make_bundle().save(tmp_path / "p.safetensors")
    assert expected_recall(str(tmp_path / "p.safetensors")) == list(RECALL)
    assert expected_recall(None) == []
