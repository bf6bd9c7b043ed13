"""The server of `flallm demo`: what it answers, what it refuses, and what it keeps."""

import contextlib
import http.client
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flallm_ds.demo.model import MAX_REQUESTS
from flallm_ds.demo.server import listen
from flallm_ds.errors import UserError
from flallm_ds.inference.heat_map import LEVELS
from flallm_ds.inference.translator import Translator
from tests.helpers.attention import no_attention
from tests.helpers.demo_server import Running
from tests.helpers.exports import DECODER_ONLY, ENCODER_DECODER, write_export
from tests.helpers.long_video import write_long_video
from tests.helpers.paths import ROOT
from tests.helpers.trees import write_audio, write_video

LINES = "application/x-ndjson"


@pytest.fixture(scope="module")
def translator(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Translator:
    """A model with two target languages."""
    folder = tmp_path_factory.mktemp("demo")
    model = write_export(DECODER_ONLY, tiny_corpus, folder / "run")
    return Translator.from_pretrained(model, "cpu")


@pytest.fixture(scope="module")
def running(translator: Translator) -> Iterator[Running]:
    running = Running(lambda: translator)
    yield running
    running.stop()


@pytest.fixture(autouse=True)
def nothing_is_kept() -> Iterator[None]:
    """After each test, no deleted file is open, so no upload is left."""
    before = deleted_files()
    yield
    # The server closes the file of a client that has left a moment later.
    end = time.monotonic() + 30
    while deleted_files() > before and time.monotonic() < end:
        time.sleep(0.05)
    assert deleted_files() <= before


def deleted_files() -> int:
    found = 0
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            found += str(link.readlink()).endswith(" (deleted)")
    return found


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / "short.mp4", 20)
    write_long_video(folder / "long.mp4", 3, rests_s=(0.7, 2.0))
    write_video(folder / "hour.mp4", 3600, fps=1)
    write_audio(folder / "audio.mp4")
    return folder


def form(fields: dict[str, str], video: bytes) -> tuple[bytes, str]:
    """A multipart form, and its content type."""
    lines = []
    for name, value in fields.items():
        lines.append(
            f'--xyz\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        )
    lines.append(
        '--xyz\r\nContent-Disposition: form-data; name="video"; '
        'filename="../../etc/passwd"\r\nContent-Type: video/mp4\r\n\r\n'
    )
    body = "".join(lines).encode() + video + b"\r\n--xyz--\r\n"
    return body, "multipart/form-data; boundary=xyz"


# --- answers


def test_the_text_is_that_of_flallm_translate(
    running: Running, translator: Translator, videos: Path
) -> None:
    content = (videos / "short.mp4").read_bytes()
    expected = translator.searching(nbest=1).translate(videos / "short.mp4", "German")
    status, done = running.post(content, "?language=de")
    assert (status, done["text"]) == (200, expected)
    (part,) = done["parts"]
    assert part["end_s"] == 2.0 and not part["is_part"] and part["frames"] == []


def test_a_form_has_the_same_options_and_a_file_of_any_name(
    running: Running, translator: Translator, videos: Path
) -> None:
    fields = {"language": "English", "nbest": "3", "frames": "4"}
    body, kind = form(fields, (videos / "short.mp4").read_bytes())
    status, done = running.post(body, Content_Type=kind)
    assert status == 200
    (part,) = done["parts"]
    expected = translator.searching(nbest=3).nbest(videos / "short.mp4", "English")
    assert [sentence for sentence, _ in part["nbest"]] == [text for text, _ in expected]
    np.testing.assert_allclose([s for _, s in part["nbest"]], [s for _, s in expected])
    assert len(part["frames"]) == 4
    assert part["frames"][0].startswith("data:image/jpeg;base64,")


def test_the_attention_is_an_option_and_the_video_is_encoded_once(
    running: Running, translator: Translator, videos: Path
) -> None:
    content = (videos / "short.mp4").read_bytes()
    encoded: list[int] = []
    handle = translator.export.visual.register_forward_hook(
        lambda module, inputs, out: encoded.append(len(out))
    )
    try:
        status, done = running.post(content, "?language=de&nbest=3&attention=true")
    finally:
        handle.remove()
    (part,) = done["parts"]
    assert status == 200 and encoded == [part["num_frames"]]
    attention = part["attention"]
    assert attention["words"] == part["sentence"].split() != []
    for levels in attention["levels"]:
        assert len(levels) == part["num_frames"] and max(levels) == LEVELS
    assert all(0 < share < 1 for share in attention["on_video"])
    assert done["attention_s"] == part["attention_s"] > 0
    # The search is the same with and without attention, and before and after it.
    _, plain = running.post(content, "?language=de&nbest=3")
    assert plain["parts"][0]["nbest"] == part["nbest"]
    assert plain["parts"][0]["attention"] is None and plain["attention_s"] == 0
    status, answer = running.post(content, "?language=de&attention=perhaps")
    assert (status, answer["error"]) == (
        400,
        "attention must be true or false, got 'perhaps'.",
    )


def test_a_model_that_gives_no_attention_translates_anyway(
    running: Running, translator: Translator, videos: Path
) -> None:
    content = (videos / "short.mp4").read_bytes()
    _, expected = running.post(content, "?language=de")
    with no_attention(translator):
        status, done = running.post(content, "?language=de&attention=true")
    assert status == 200 and done["text"] == expected["text"] != ""
    assert done["parts"][0]["attention"] == {
        "problem": "This language model has no attention from words to frames."
    }


def test_a_long_video_has_events_and_subtitles(
    running: Running, translator: Translator, videos: Path
) -> None:
    content = (videos / "long.mp4").read_bytes()
    query = "/api/translate?language=de&long=true"
    status, headers, answer = running.ask("POST", query, content, Accept=LINES)
    assert (status, headers["content-type"]) == (200, LINES)
    events = [json.loads(line) for line in answer.splitlines()]
    assert events[0] == {"state": "translating"}
    found = translator.searching(nbest=1).translations(
        videos / "long.mp4", "de", windows=True
    )
    expected = [(part.start_s, part.sentence) for part in found]
    assert len(expected) == 3
    parts = [event["part"] for event in events[1:-1]]
    assert [part["sentence"] for part in parts] == [text for _, text in expected]
    np.testing.assert_allclose(
        [part["start_s"] for part in parts], [start for start, _ in expected], atol=1e-3
    )
    subtitles = events[-1]["done"]["subtitles"]
    assert subtitles.startswith("WEBVTT\n\n") and subtitles.count(" --> ") == 3


def test_the_page_and_its_files_are_the_only_ones(running: Running) -> None:
    for path, kind in (
        ("/", "html"),
        ("/page.css", "css"),
        ("/page.js", "javascript"),
        ("/heat_map.css", "css"),
        ("/heat_map.js", "javascript"),
    ):
        status, headers, content = running.ask("GET", path)
        assert status == 200 and kind in headers["content-type"] and content
        # Nothing of another server, and no script within the page.
        shown = content.replace(b"http://www.w3.org/2000/svg", b"")  # a name, not a request
        assert b"http://" not in shown and b"https://" not in shown
        assert "default-src 'none'" in headers["content-security-policy"]
    for path in (
        "/docs",
        "/openapi.json",
        "/page.html",
        "/../pyproject.toml",
        "/etc/passwd",
    ):
        status, _, content = running.ask("GET", path)
        assert status == 404 and "error" in json.loads(content)


# --- refused requests


def test_what_is_no_video_is_refused_in_a_sentence(running: Running, videos: Path) -> None:
    ten_minutes = (videos / "hour.mp4").read_bytes()
    cases = [
        (b"no video", "?language=de", 422, "Cannot open the video: Invalid data found"),
        (b"", "?language=de", 400, "The request must contain a video, got an empty one"),
        (
            (videos / "audio.mp4").read_bytes(),
            "?language=de",
            422,
            "it has no video stream",
        ),
        (ten_minutes, "?language=de", 422, "The video must be at most 60 s long, got"),
        (b"#EXTM3U\n/etc/passwd\n", "?language=de", 422, "Cannot open the video"),
        (b"x", "?language=fr", 400, "language must be a target language of the model ("),
        (b"x", "", 400, "language must be a target language of the model ("),
        (b"x", "?language=de&nbest=99", 400, "nbest must be at least 1 and at most"),
        (b"x", "?nbest=many", 400, "nbest must be a whole number, got 'many'"),
        (b"x", "?frames=1000", 400, "frames must be at least 0 and at most"),
        (b"x", "?path=/etc/passwd", 400, "Cannot set 'path': there is no such field"),
    ]
    for body, query, expected, sentence in cases:
        status, answer = running.post(body, query)
        assert status == expected and sentence in answer["error"], answer
        assert "\n" not in answer["error"] and "/proc" not in answer["error"]


def test_a_wrong_form_is_refused_in_a_sentence(running: Running) -> None:
    kind = "multipart/form-data; boundary=xyz"
    many, _ = form({f"field{number}": "" for number in range(20)}, b"x")
    long, _ = form({"language": "x" * 2000}, b"x")
    for body, sentence in (
        (b"no form", "Cannot read the form"),
        (many, "is one too many"),
        (long, "A field must have at most 1000 bytes"),
    ):
        status, answer = running.post(body, Content_Type=kind)
        assert status == 400 and sentence in answer["error"], answer


def test_a_huge_upload_is_refused_before_it_is_sent(running: Running) -> None:
    head = b"POST /api/translate HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000000\r\n\r\n"
    status, sentence = refusal(running, head, b"")
    assert status == 413
    assert "The video must be at most 2 MB, got 5000.0 MB." in sentence


def test_an_endless_upload_is_cut_off_at_the_limit(running: Running) -> None:
    head = (
        b"POST /api/translate HTTP/1.1\r\nHost: localhost\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    status, sentence = refusal(running, head, chunk)
    assert status == 413 and "at most 2 MB, got more" in sentence


def refusal(running: Running, head: bytes, chunk: bytes) -> tuple[int, str]:
    """Send a head, then chunks until the server answers; return status and sentence."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as client:
        client.sendall(head)
        num_sent = 0
        while not select.select([client], [], [], 0 if chunk else 60)[0]:
            client.sendall(chunk)
            num_sent += len(chunk)
            assert num_sent < 100e6, "the server must answer while the upload is sent"
        answer = http.client.HTTPResponse(client)
        answer.begin()
        return answer.status, json.loads(answer.read())["error"]


def test_a_full_disk_is_one_sentence(running: Running) -> None:
    """A limit on the size of files fails as a full disk does."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        status, answer = running.post(bytes(1_000_000), "?language=de")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 507
    assert answer["error"].startswith("Cannot read or write a file: File too large. Free")


def test_requests_of_other_pages_are_refused(running: Running, videos: Path) -> None:
    content = (videos / "short.mp4").read_bytes()
    own = f"localhost:{running.port}"
    cases = [
        ({"Origin": "http://evil.example"}, "must come from the page of the demo"),
        ({"Origin": "null"}, "must come from the page of the demo"),
        ({"Origin": "http://localhost:1"}, "must come from the page of the demo"),
        ({"Host": "evil.example"}, "The Host header must be"),
        ({"Host": "10.0.0.1"}, "The Host header must be"),
        ({"Host": "localhost.evil.example"}, "The Host header must be"),
        ({"Host": "[bad"}, "The Host header must be"),
    ]
    for headers, sentence in cases:
        status, answer = running.post(content, "?language=de", **{"Host": own, **headers})
        assert status == 403 and sentence in answer["error"], headers
    for headers in ({"Host": own, "Origin": f"http://{own}"}, {"Host": "[::1]:80"}):
        assert running.post(content, "?language=de", **headers)[0] == 200


# --- the line


def test_requests_wait_for_their_turn_and_too_many_are_refused(
    translator: Translator, videos: Path
) -> None:
    """While the model is loaded, requests are taken, and wait."""
    loaded = threading.Event()

    def load() -> Translator:
        loaded.wait(120)
        return translator

    running = Running(load)
    content = (videos / "short.mp4").read_bytes()
    before = deleted_files()
    try:
        _, _, answer = running.ask("GET", "/api/info")
        assert json.loads(answer)["ready"] is False
        answers: list[list[dict[str, Any]]] = []
        threads = []
        for _ in range(MAX_REQUESTS):
            thread = threading.Thread(target=add_events, args=(running, content, answers))
            thread.start()
            threads.append(thread)
        end = time.monotonic() + 60
        while len(running.server.model._line) < MAX_REQUESTS:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert deleted_files() == before + MAX_REQUESTS
        status, refused = running.post(content, "?language=de")
        assert status == 503 and "8 others are translated before" in refused["error"]
        loaded.set()
        for thread in threads:
            thread.join(120)
        assert len({events[-1]["done"]["text"] for events in answers}) == 1
        first = sorted((events[0] for events in answers), key=json.dumps)
        assert first == [
            {"state": "loading"},
            *({"state": "waiting", "before": n} for n in range(1, MAX_REQUESTS)),
        ]
        _, _, answer = running.ask("GET", "/api/info")
        names = [language["tag"] for language in json.loads(answer)["languages"]]
        assert names == ["de", "en"]
    finally:
        loaded.set()
        running.stop()


def add_events(running: Running, content: bytes, answers: list[Any]) -> None:
    path = "/api/translate?language=de"
    _, _, answer = running.ask("POST", path, content, Accept=LINES)
    answers.append([json.loads(line) for line in answer.splitlines()])


def test_a_client_that_leaves_frees_its_place(
    running: Running, translator: Translator, videos: Path
) -> None:
    content = (videos / "long.mp4").read_bytes()
    head = f"POST /api/translate?language=de&long=true HTTP/1.1\r\nHost: localhost\r\nAccept: {LINES}\r\n"
    for length in (len(content), len(content) + 1):  # translating, and still sending
        client = socket.create_connection(("127.0.0.1", running.port), timeout=60)
        client.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode() + content)
        if length == len(content):
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        client.close()
    end = time.monotonic() + 60
    while running.server.model._num_requests:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert running.server.model._line == []


def test_an_unexpected_error_is_one_sentence_for_the_client(
    translator: Translator, videos: Path
) -> None:
    broken = Running(lambda: replace(translator, beam=None))
    content = (videos / "short.mp4").read_bytes()
    try:
        status, answer = broken.post(content, "?language=de")
        assert status == 500 and "the terminal of flallm demo" in answer["error"]
        path = "/api/translate?language=de"
        _, _, lines = broken.ask("POST", path, content, Accept=LINES)
        assert json.loads(lines.splitlines()[-1]) == {"error": answer["error"]}
    finally:
        broken.stop()


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> Translator:
        raise UserError("Cannot read the export.")

    running = Running(load)
    running.thread.join(60)
    assert str(running.error) == "Cannot read the export."
    running.stop()


# --- the command


def demo(*options: str, tmp: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "flallm_ds", "demo", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_command_prints_its_address_and_ends_at_ctrl_c(
    tiny_corpus: Path, videos: Path, tmp_path: Path
) -> None:
    model = write_export(ENCODER_DECODER, tiny_corpus, tmp_path / "run")
    (tmp_path / "tmp").mkdir()
    process = demo(f"--model={model}", "--port=0", tmp=tmp_path / "tmp")
    assert process.stdout is not None
    url = process.stdout.readline().split()[0]
    port = int(url.rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    # Sent while the model is loaded.
    connection.request("POST", "/api/translate", (videos / "short.mp4").read_bytes())
    done = json.loads(connection.getresponse().read())
    assert done["text"] == Translator.from_pretrained(model, "cpu").translate(
        videos / "short.mp4"
    )
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (130, "stopped.\n")
    assert output == "The model is loaded.\n"
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_port_in_use_is_one_sentence() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port}: the port is in use"):
            listen("127.0.0.1", port)
    with pytest.raises(UserError, match="--host must be an address of this machine"):
        listen("no.such.host.invalid", 0)
    with pytest.raises(UserError, match=r"Cannot listen on 192\.0\.2\.1:0: "):
        listen("192.0.2.1", 0)
