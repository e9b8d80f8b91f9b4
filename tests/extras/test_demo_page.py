"""The demo's page in headless Chromium: it writes, counts, and stays on this machine."""

import http.client
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import archzoo
from archzoo.cli import main
from archzoo.tasks.tokenizers import CharacterTokenizer

pytestmark = pytest.mark.extras

# What a page would obey if it were not escaped: as markup, as a template's value, as script.
HOSTILE = "<img src=x onerror='window.alerted=1'>${window.alerted=1}{{1+1}}&amp;<b>"
TOKENIZER = CharacterTokenizer("".join(sorted(set(HOSTILE + "\n to be, or not?"))))
NAMES = ("retnet_micro", "transformer_micro")

# The command, saying on stderr where else than to this machine it would connect; and what its
# threads do, on SIGABRT.
PROGRAM = """
import faulthandler, socket, sys
faulthandler.enable()
connect = socket.socket.connect
def watched(self, address):
    if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
        print("WENT TO", address, file=sys.stderr, flush=True)
    return connect(self, address)
socket.socket.connect = watched
from archzoo.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    place = tmp_path_factory.mktemp("models")
    for name in NAMES:
        torch.manual_seed(1)
        model = archzoo.create_model(name, vocab_size=TOKENIZER.vocab_size)
        archzoo.save_pretrained(place / name, model, TOKENIZER)
    return [str(place / name) for name in NAMES]


def heed_ctrl_c() -> None:
    """A shell's job in the background ignores it, and so do all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def served(checkpoints: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a page; its server ends by Ctrl-C, and had nothing to say."""
    errors = tmp_path_factory.mktemp("server") / "stderr"
    command = [sys.executable, "-c", PROGRAM, "demo", *checkpoints, "--web", "--port", "0"]
    command += ["--prompt", "to be", "--max_tokens", "80"]
    with errors.open("w") as file:
        server = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, preexec_fn=heed_ctrl_c
        )
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.match(r"(http://127\.0\.0\.1:\d+) shows the demo; Ctrl-C ends it", line)
    if found is None:
        server.kill()
        pytest.fail(line + errors.read_text())
    try:
        yield found[1]
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(60) == 0
        except subprocess.TimeoutExpired:
            server.send_signal(signal.SIGABRT)
            server.wait(10)
            pytest.fail(f"Ctrl-C did not end it:\n{errors.read_text()}")
    finally:
        server.kill()
    assert server.stdout.read() == "ended\n"
    assert errors.read_text() == ""


def request(served: str, path: str, method: str = "GET", **headers: str) -> int:
    connection = http.client.HTTPConnection(served.removeprefix("http://"), timeout=20)
    connection.request(method, path, headers=headers)
    return connection.getresponse().status


def opened(visit: Any, served: str, **how: Any) -> Any:
    page = visit(served, **how)
    page.set_default_timeout(60_000)  # a server and a browser on one busy machine
    page.locator("#generate").wait_for()
    return page


def generate(page: Any, prompt: str) -> None:
    page.fill("#prompt textarea", prompt)
    page.click("#generate")


def write(page: Any, tokens: int) -> None:
    count = page.locator("input[type=number][aria-label*='tokens to write']")
    count.fill(str(tokens))
    count.press("Enter")


def figure(page: Any, number: int, label: str) -> str:
    return page.locator(f"#card{number} [data-figure='{label}']").inner_text()


def finished(page: Any, tokens: int = 80) -> None:
    page.locator("#status", has_text=f"{tokens} tokens, state").wait_for()


def test_both_models_write_and_their_counters_move(visit: Any, served: str) -> None:
    page = opened(visit, served)
    assert figure(page, 0, "ms a token") == figure(page, 1, "state bytes") == "–"
    # A note of every figure that is ever shown.
    page.evaluate(
        """() => {
            window.seen = {};
            new MutationObserver(() => document.querySelectorAll('[data-figure]').forEach(
                (figure, index) => (window.seen[index] ??= new Set()).add(figure.textContent)
            )).observe(document.body, {subtree: true, childList: true, characterData: true});
        }"""
    )
    write(page, 1500)
    generate(page, "to be")
    finished(page, 1500)
    seen = [set(entry) for entry in page.evaluate("Object.values(window.seen).map(s => [...s])")]
    seen = [{text for text in entry if text != "–"} for entry in seen]
    assert all(len(seen[index]) > 1 for index in (0, 2)), "times move"
    assert len(seen[1]) == 1, "retention's state stays"
    assert len(seen[3]) > 1, "attention's grows"
    for number in (0, 1):
        card = page.locator(f"#card{number} .az-text").inner_text()
        assert card.startswith("to be") and len(card) == len("to be") + 1500
        assert "1,500 tokens written" in page.locator(f"#card{number}").inner_text()
        assert page.locator(f"#card{number} polyline").count() == 2
    # Two heads of half-lives 22 and 44, and attention, that keeps all.
    memory = page.locator("#memory0").inner_text()
    assert "half-life 22 tokens" in memory and "half-life 44 tokens" in memory
    shades = page.locator("#memory0 .az-head >> nth=0 >> span").evaluate_all(
        "spans => spans.map(span => span.style.backgroundColor)"
    )
    assert len(set(shades)) > 10, "the further back, the fainter"
    assert page.locator("#memory1 .az-head").count() == 1
    assert "keeps every token" in page.locator("#memory1").inner_text()
    assert not page.locator("#layer").is_visible(), "all layers are alike"
    visit.photograph(page, "demo_written")


def test_what_is_typed_or_written_is_text(visit: Any, served: str) -> None:
    page = opened(visit, served)
    generate(page, HOSTILE)
    finished(page)
    for number in (0, 1):
        assert page.locator(f"#card{number} .az-text").inner_text().startswith(HOSTILE)
        assert HOSTILE in page.locator(f"#memory{number}").inner_text()
    page.get_by_role("tab", name="Three forms").click()
    page.click("#compare")
    page.locator(".az-verdict >> nth=1").wait_for()
    assert page.evaluate("window.alerted") is None
    assert page.locator("#card0 img, #memory0 img, #compared img").count() == 0


@pytest.mark.parametrize(
    ("prompt", "error"),
    [("", "the prompt is empty"), ("Zoo", "character 'Z' (U+005A) at position 0 is not one of")],
)
def test_a_prompt_that_cannot_be_read_gets_one_line(
    visit: Any, served: str, prompt: str, error: str
) -> None:
    page = opened(visit, served)
    generate(page, prompt)
    alert = page.locator("#status .az-error")
    alert.wait_for()
    assert alert.inner_text().startswith(error)
    page.get_by_role("tab", name="Three forms").click()
    page.click("#compare")
    page.locator("#compared .az-error").wait_for()
    page.click("#generate")  # and the page is as good as before
    generate(page, "to be")
    finished(page)


def test_a_press_while_the_models_write_is_not_lost(visit: Any, served: str) -> None:
    page = opened(visit, served)
    write(page, 1500)
    generate(page, "to be")
    page.locator("#status", has_text="writing").wait_for()
    write(page, 30)
    generate(page, "or not")
    finished(page, 30)
    assert page.locator("#card0 .az-text").inner_text().startswith("or not")


def test_a_prompt_is_limited_in_length(visit: Any, served: str) -> None:
    page = opened(visit, served)
    assert page.locator("#prompt textarea").get_attribute("maxlength") == "2000"


def test_a_context_length_shows_state_and_time(visit: Any, served: str) -> None:
    page = opened(visit, served)
    page.get_by_role("tab", name="Context length").click()
    table = page.locator("#table table")
    assert "524,312 bytes" in table.inner_text() and "not measured yet" in table.inner_text()
    slider = page.locator("#context input[type=number]")
    slider.fill("256")
    slider.press("Enter")
    page.locator("#table", has_text="state after 256 tokens").wait_for()
    assert "131,096 bytes" in table.inner_text()
    page.click("#measure")
    page.wait_for_function(
        "(document.querySelector('#table').innerText.match(/\\d\\.\\d\\d ms/g) || []).length == 2"
    )
    # What Gradio turns while it waits is a third, until the last press is answered.
    page.wait_for_function("document.querySelectorAll('#table svg').length == 2")
    visit.photograph(page, "demo_contexts")


def test_three_forms_write_the_same(visit: Any, served: str) -> None:
    page = opened(visit, served)
    page.get_by_role("tab", name="Three forms").click()
    page.click("#compare")
    page.locator(".az-verdict >> nth=1").wait_for()
    for number in (0, 1):
        assert "same: yes" in page.locator(f".az-verdict >> nth={number}").inner_text()
    for form in ("parallel", "chunkwise", "recurrent"):
        assert page.get_by_role("cell", name=form, exact=True).count() == 2
    visit.photograph(page, "demo_forms")


def test_it_can_be_stopped(visit: Any, served: str) -> None:
    page = opened(visit, served)
    write(page, 2000)
    page.click("#generate")
    page.wait_for_function("!document.querySelector('#card0').innerText.includes(' 0 tokens')")
    page.evaluate("document.querySelector('#stop').click()")  # while all is redrawn
    page.locator("#status", has_text="tokens, state").wait_for()
    assert "2,000 tokens" not in page.locator("#card0").inner_text()
    assert page.locator("#card0 .az-about", has_text="Error").count() == 0


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1100, True)])
def test_it_fits_a_phone_and_a_dark_page(visit: Any, served: str, width: int, dark: bool) -> None:
    page = opened(visit, served, width=width, dark=dark)
    generate(page, "to be")
    finished(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    first, second = (page.locator(f"#card{n} .az-card").bounding_box() for n in (0, 1))
    assert (first["y"] == second["y"]) == (width > 500), "beside each other where they fit"
    spill = "box => [...box.querySelectorAll('*')].some(e => e.scrollWidth > box.clientWidth)"
    assert not page.locator("#card1 .az-card").evaluate(spill)
    visit.photograph(page, f"demo_{width}{'_dark' * dark}")


def test_nothing_but_the_page_is_served(served: str) -> None:
    assert request(served, "/") == 200
    for path in ("file=/etc/passwd", "proxy=http://localhost", "info", "upload_progress"):
        assert request(served, f"/gradio_api/{path}") == 404, path
    for path in ("/file=/etc/passwd", "/docs", "/openapi.json", "/monitoring", "/gradio_api"):
        assert request(served, path) == 404, path
    assert request(served, "/static/../../../../../etc/passwd") in (403, 404)
    assert request(served, "/gradio_api/upload", "POST") == 404
    assert request(served, "/gradio_api/run/generate", "POST") == 404
    assert request(served, "/", Host="elsewhere.example") == 400


def test_it_listens_on_this_machine_alone(served: str) -> None:
    port = int(served.rpartition(":")[2])
    with socket.socket() as probe, pytest.raises(OSError, match="refused"):
        probe.connect(("127.0.0.2", port))  # another address of the machine


def test_a_port_in_use_gets_one_line(
    served: str, checkpoints: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    port = served.rpartition(":")[2]
    assert main(["demo", checkpoints[0], "--web", "--port", port, "--prompt", "to be"]) == 1
    error = capsys.readouterr().err
    assert f"port={port} cannot be listened on (address already in use)" in error
    assert error.count("\n") == 1
