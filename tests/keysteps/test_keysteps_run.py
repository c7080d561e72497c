"""The commands of r1vl_jax.keysteps: files in and out, resuming, failing, and models behind a real server."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from helpers.server import Server, chat, free_port
from helpers.waiting import HANG_S, wait_until
from PIL import Image

from r1vl_jax.keysteps.__main__ import main

SOLUTION = "### Step 1:\nAs drawn, AD is a median.\n\n### Step 2:\nHence x = {0}.\n\n### The final answer is: {0}"
REPLY = json.dumps({"Steps": [["AD is a median", "median is AD"], "x = 3"]})


def make_rows(count):
    return [
        {"image_path": f"{n}.png", "problem": f"Find x of {n}.", "solution": SOLUTION.format(n), "id": n, "note": "é"}
        for n in range(count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def files(tmp_path):
    return write(tmp_path / "in.jsonl", make_rows(6)), tmp_path / "out.jsonl"


def run(*args):
    return main([str(arg) for arg in args])


def asked(server):
    """How often the server was asked about each row."""
    texts = [request["messages"][0]["content"] for request in server.requests]
    return Counter(int(text.partition("Find x of ")[2].partition(".")[0]) for text in texts)


def beside(out):
    return {path.name for path in out.parent.iterdir()}


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("array_in", [False, True])
@pytest.mark.parametrize("name", ["out.jsonl", "out.json"])
def test_rows_keep_order_and_fields(tmp_path, capsys, array_in, name):
    rows = make_rows(4)
    source, out = tmp_path / "in.data", tmp_path / name
    source.write_text("\ufeff" + json.dumps(rows, indent=1) if array_in else "\n".join(map(json.dumps, rows)))
    assert run("rules", source, out) == 0
    made = json.loads(out.read_text()) if name.endswith(".json") else read(out)
    assert [{key: row[key] for key in rows[0]} for row in made] == rows
    assert made[2]["key_steps"] == {"Steps": [["AD is a median"], ["x = 2"]]}
    assert beside(out) == {"in.data", name}
    assert "4 rows done; 8 groups, 1.0 alternatives per group" in capsys.readouterr().err


def test_solutions_in_another_format(tmp_path, capsys):
    texts = [
        "<think>\nSo AD is a median.\n\nThen the area is 12/2 = 6.\n</think>\n<answer>6</answer>",
        "<answer>12/2 = 6</answer>",
    ]
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"problem": "Find x.", "solution": text}) + "\n" for text in texts))
    assert run("rules", source, out, "--answer-format", "think") == 1
    assert read(out)[0]["key_steps"] == {"Steps": [["AD is a median"], ["12/2 = 6"]]}
    assert "no step in the format think" in read(tmp_path / "out.jsonl.failed.jsonl")[0]["reason"]
    capsys.readouterr()
    assert run("lint", out, "--answer-format", "think", "--json") == 0
    assert [found["kind"] for found in json.loads(capsys.readouterr().out)] == ["missing"]
    assert run("lint", out, "--json") == 0
    assert "absent" in [found["kind"] for found in json.loads(capsys.readouterr().out)]


def test_bad_rows_are_named_and_counted(tmp_path, capsys):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good, old = make_rows(1)[0], {"Steps": ["old"]}
    lines = [
        json.dumps(good),
        "{not json",
        "[1, 2]",
        json.dumps({"problem": "P", "key_steps": old}),
        "",
        '{"a": "\\ud800"}',
    ]
    source.write_text("\n".join(lines))
    assert run("rules", source, out) == 1
    made = read(out)
    assert [row.get("key_steps") for row in made] == [{"Steps": [["AD is a median"], ["x = 0"]]}, old, None]
    failed = read(tmp_path / "out.jsonl.failed.jsonl")
    assert [one["row"] for one in failed] == [1, 2, 3, 5]
    reasons = [one["reason"] for one in failed]
    assert "not JSON" in reasons[0] and "[1, 2]" in reasons[1] and "'solution': missing" in reasons[2]
    err = capsys.readouterr().err
    assert "1 rows done, 2 failed, 2 skipped (no JSON object)" in err
    assert all(reason in err for reason in reasons)


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"", "empty"), (b"[1, 2", "not JSON"), (b"\xff\xfe{", "not UTF-8"), (b"[]", "empty")],
)
@pytest.mark.parametrize("command", ["rules", "lint"])
def test_unusable_input(tmp_path, capsys, command, content, message):
    source = tmp_path / "in.json"
    if content is not None:
        source.write_bytes(content)
    assert run(command, source, *([tmp_path / "out.jsonl"] * (command == "rules"))) == 2
    err = capsys.readouterr().err
    assert message in err and "in.json" in err and "Traceback" not in err


def test_outputs_that_cannot_be_written(files, capsys, tmp_path):
    source, out = files
    assert run("rules", source, source) == 2
    assert run("rules", source, tmp_path) == 2
    assert run("rules", source, tmp_path / "no" / "folder.jsonl") == 2
    assert run("rules", source, out) == 0
    before = out.read_text()
    assert run("rules", source, out) == 2  # complete: not made again by accident
    err = capsys.readouterr().err
    assert "is the input" in err and "not a plain file" in err and "cannot be written" in err and "--overwrite" in err
    out.write_text("mine")
    assert run("rules", source, out, "--overwrite") == 0
    assert out.read_text() == before


# --- resuming --------------------------------------------------------------------------------------------------------


def test_limit_tries_and_the_next_run_goes_on(files):
    source, out = files
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        endpoint = ["--url", server.url, "--model", "m"]
        assert run("extract", source, out, *endpoint, "--limit", "2") == 0
        assert [row["id"] for row in read(out)] == [0, 1]
        assert run("extract", source, out, *endpoint) == 0
        assert asked(server) == dict.fromkeys(range(6), 1)
    assert [row["id"] for row in read(out)] == list(range(6))
    assert beside(out) == {"in.jsonl", "out.jsonl"}


def test_failed_rows_are_kept_and_only_they_are_tried_again(files, capsys):
    source, out = files
    rows = make_rows(6)
    rows[4]["key_steps"] = {"Steps": ["old"]}
    write(source, rows)
    broken = {1: (200, {}, chat("I would rather not.")), 4: (400, {}, {"error": {"message": "too long"}})}

    def answer(request, number):
        text = request["messages"][0]["content"]
        return next((reply for n, reply in broken.items() if f"Find x of {n}." in text), (200, {}, chat(REPLY)))

    with Server(answer) as server:
        endpoint = ["--url", server.url, "--model", "m", "--retries", "0"]
        assert run("extract", source, out, *endpoint) == 1
        made = read(out)
        assert [row["id"] for row in made] == list(range(6))
        assert "key_steps" not in made[1] and made[4] == rows[4]
        reasons = {one["row"]: one["reason"] for one in read(out.with_name("out.jsonl.failed.jsonl"))}
        assert set(reasons) == {1, 4} and "I would rather not" in reasons[1] and "too long" in reasons[4]
        assert "4 rows done, 2 failed" in capsys.readouterr().err

        del broken[4]
        server.requests.clear()
        assert run("extract", source, out, *endpoint) == 1
        assert asked(server) == {1: 1, 4: 1}
        assert "5 rows done, 4 of them before, 1 failed" in capsys.readouterr().err
        broken.clear()
        assert run("extract", source, out, *endpoint) == 0
    groups = {"Steps": [["AD is a median", "median is AD"], ["x = 3"]]}
    assert [row["key_steps"] for row in read(out)] == [groups] * 6
    assert beside(out) == {"in.jsonl", "out.jsonl"}


def start(source, out, url, *more):
    # A shell starts its background jobs, such as these tests may be, with SIGINT ignored.
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{heard}; runpy.run_module('r1vl_jax.keysteps', run_name='__main__', alter_sys=True)"
    arguments = ["extract", str(source), str(out), "--url", url, "--model", "m", *more]
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OPENAI_API_KEY": ""},
    )


def wait_for_rows(partial, count, process):
    there = lambda: partial.exists() and partial.read_bytes().count(b"\n") > count  # noqa: E731 (a header, then rows)
    wait_until(there, still_possible=lambda: process.poll() is None)


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on_where_it_was(tmp_path, stop):
    """The server answers five rows and then holds the others until the run has ended, for which it does not wait."""
    source, out = write(tmp_path / "in.jsonl", make_rows(12)), tmp_path / "out.jsonl"
    partial, ended, let_go = tmp_path / "out.jsonl.partial", threading.Event(), []

    def answer(request, number):
        if number > 5 and not ended.wait(HANG_S):
            let_go.append(number)
        return 200, {}, chat(REPLY)

    with Server(answer) as server:
        process = start(source, out, server.url, "--concurrency", "2")
        try:
            wait_for_rows(partial, 5, process)
            process.send_signal(stop)
            _, err = process.communicate()
        finally:
            process.kill()
        assert not let_go  # Ctrl-C does not wait for the requests under way
        ended.set()
        assert process.returncode == (130 if stop == signal.SIGINT else -signal.SIGKILL)
        assert "Traceback" not in err
        assert not out.exists()
        finished = {json.loads(line)["row"] for line in partial.read_text().splitlines()[1:]}
        assert len(finished) == 5
        with open(partial, "a") as file:
            file.write('{"row": 11, "made": {"pro')  # what a kill in the middle of a write leaves
        server.requests.clear()
        for more in (["--limit", "8"], []):
            assert run("extract", source, out, "--url", server.url, "--model", "m", *more) == 0
        assert asked(server) == {n: 1 for n in range(12) if n not in finished}
    assert [row["id"] for row in read(out)] == list(range(12))
    assert all(len(row["key_steps"]["Steps"]) == 2 for row in read(out))
    assert beside(out) == {"in.jsonl", "out.jsonl"}


def test_other_input_and_other_settings_are_refused(files, capsys):
    source, out = files
    assert run("rules", source, out, "--limit", "2") == 0
    before = (out.read_bytes(), out.with_name("out.jsonl.partial").read_bytes())
    assert run("rules", source, out, "--per-step", "2") == 2
    assert "per_step was 3 and is now 2" in capsys.readouterr().err
    assert run("refine", source, out) == 2
    assert "command was 'rules' and is now 'refine'" in capsys.readouterr().err
    write(source, make_rows(7))
    assert run("rules", source, out) == 2
    assert "input is another file" in capsys.readouterr().err
    assert before == (out.read_bytes(), out.with_name("out.jsonl.partial").read_bytes())
    assert run("rules", source, out, "--overwrite") == 0
    assert len(read(out)) == 7


def test_settings_of_the_model_are_remembered_and_those_of_the_transport_are_not(files, capsys, tmp_path):
    source, out = files
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        endpoint = ["--url", server.url, "--limit", "1"]
        assert run("extract", source, out, *endpoint, "--model", "m") == 0
        prompt = tmp_path / "prompt.txt"
        prompt.write_text("{problem} {solution}")
        for other in (["--model", "n"], ["--model", "m", "--temperature", "1"], ["--model", "m", "--prompt", prompt]):
            assert run("extract", source, out, *endpoint, *other) == 2
        err = capsys.readouterr().err
        assert "model was 'm' and is now 'n'" in err and "temperature was" in err and "prompt was" in err
        assert run("extract", source, out, *endpoint, "--model", "m", "--concurrency", "1", "--retries", "1") == 0


def test_a_partial_file_that_is_none(files, capsys):
    source, out = files
    out.with_name("out.jsonl.partial").write_text("hello\nyou\nthere\n")
    assert run("rules", source, out) == 2
    assert "not a file of this command" in capsys.readouterr().err
    assert run("rules", source, out, "--overwrite") == 0


def test_one_run_at_a_time(tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", make_rows(3)), tmp_path / "out.jsonl"
    ended = threading.Event()
    with Server(lambda *_: (ended.wait(HANG_S), (200, {}, chat(REPLY)))[1]) as server:
        process = start(source, out, server.url)
        try:
            wait_for_rows(tmp_path / "out.jsonl.partial", 0, process)
            assert run("extract", source, out, "--url", server.url, "--model", "m", "--overwrite") == 2
            assert "another run" in capsys.readouterr().err
            ended.set()
            assert process.wait() == 0
        finally:
            process.kill()
            process.stderr.close()
    assert len(read(out)) == 3


# --- the endpoint ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "hint"), [(401, "OPENAI_API_KEY"), (404, "no such address or model")])
def test_a_wrong_key_or_model_stops_at_once(tmp_path, capsys, status, hint):
    source, out = write(tmp_path / "in.jsonl", make_rows(200)), tmp_path / "out.jsonl"
    with Server(lambda *_: (status, {}, {"error": {"message": "no"}})) as server:
        assert run("extract", source, out, "--url", server.url, "--model", "m", "--concurrency", "4") == 2
        assert len(server.requests) <= 12
    assert hint in capsys.readouterr().err
    assert not out.exists()


def test_no_server_stops_at_once(tmp_path, capsys):
    source, out = write(tmp_path / "in.jsonl", make_rows(200)), tmp_path / "out.jsonl"
    url = f"http://127.0.0.1:{free_port()}/v1"
    assert run("extract", source, out, "--url", url, "--model", "m", "--retries", "0") == 2
    assert "requests in a row failed" in capsys.readouterr().err
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:  # nothing was finished, so other settings may follow
        assert run("extract", source, out, "--url", server.url, "--model", "other", "--limit", "3") == 0


def test_url_and_model_come_from_the_environment_too(files, capsys, monkeypatch):
    source, out = files
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    assert run("extract", source, out) == 2
    assert "no --url and no OPENAI_BASE_URL" in capsys.readouterr().err
    assert run("extract", source, out, "--url", "localhost:80", "--model", "m") == 2
    assert "expected http" in capsys.readouterr().err
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert run("extract", source, out) == 2
        assert "no --model and no OPENAI_MODEL" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_MODEL", "from-env")
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert run("extract", source, out) == 0
        assert {request["model"] for request in server.requests} == {"from-env"}
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
        server.requests.clear()
        assert run("refine", out, out.with_name("short.jsonl")) == 0  # by rule: nobody asked for the model
        assert not server.requests


def test_no_file_has_the_key(files, capsys, monkeypatch, tmp_path):
    """OUT, OUT.partial and OUT.failed.jsonl, of a server that sends the key back in its errors; nor what is printed."""
    source, out = files
    monkeypatch.setenv("OPENAI_API_KEY", "sk-private-key")

    def answer(request, number):
        echo = {"error": {"message": "bad request with sk-private-key"}}
        return (200, {}, chat(REPLY)) if number % 2 else (400, {}, echo)

    with Server(answer) as server:
        assert server.url.startswith("http://127")
        assert run("extract", source, out, "--url", server.url, "--model", "m", "--concurrency", "1") == 1
        assert "sk-private-key" in server.headers[0]["Authorization"]
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4 and any("bad request with ***" in text for text in files)
    assert not [text for text in [*files, *capsys.readouterr()] if "private" in text]


def test_nothing_but_images_of_the_folder_is_sent(files, tmp_path):
    """A row may name any file of the machine."""
    folder, private = tmp_path / "in", tmp_path / "private.png"
    folder.mkdir()
    source, out = folder / "rows.jsonl", tmp_path / "sent.jsonl"
    for path in (folder / "a.png", private):
        Image.new("RGB", (28, 28)).save(path)
    (folder / "link.png").symlink_to(private)
    (folder / "text.png").write_text("ssh-ed25519 ...")
    os.mkfifo(folder / "fifo.png")
    refused = [
        "/etc/passwd",
        str(private),
        "../private.png",
        "link.png",
        "text.png",
        "fifo.png",
        ".",
        "a\0b",
        "/dev/zero",
    ]
    paths = ["a.png", str(folder / "a.png"), *refused]
    write(source, [row | {"image_path": path} for row, path in zip(make_rows(len(paths)), paths, strict=True)])
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        endpoint = ["--url", server.url, "--model", "m", "--image"]
        assert run("extract", source, out, *endpoint) == 1
        assert len(server.requests) == 2
        failed = read(tmp_path / "sent.jsonl.failed.jsonl")
        assert [row["row"] for row in failed] == list(range(2, len(paths)))
        for row in failed[:4]:
            assert "outside of" in row["reason"] and "--allow-outside" in row["reason"]
        assert run("extract", source, out, *endpoint, "--allow-outside") == 1
        assert len(server.requests) == 5  # the three images outside, and still no other file
    assert "ssh-ed25519" not in json.dumps(server.requests)


def test_a_prompt_of_the_users(files, capsys, tmp_path):
    source, out = files
    write(source, [{"problem": "Find {solution}.", "solution": "x = {problem}", "key_steps": None}])
    prompt = tmp_path / "prompt.txt"
    prompt.write_text('{"a": {}} {problem} then {solution} {other}')
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        endpoint = ["--url", server.url, "--model", "m", "--prompt", prompt]
        assert run("extract", source, out, *endpoint) == 0
        assert server.requests[0]["messages"][0]["content"] == '{"a": {}} Find {solution}. then x = {problem} {other}'
        for text, name in (("{problem}", "{solution}"), ("{solution}", "{problem}")):
            prompt.write_text(text)
            assert run("extract", source, out, "--overwrite", *endpoint) == 2
            assert f"has no {name}" in capsys.readouterr().err


def test_our_prompt_has_question_solution_and_form(files):
    source, out = files
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        assert run("extract", source, out, "--url", server.url, "--model", "m", "--limit", "1") == 0
    (text,) = [request["messages"][0]["content"] for request in server.requests]
    row = make_rows(1)[0]
    assert row["problem"] in text and row["solution"] in text and '{"Steps": [[' in text
    assert "{problem}" not in text and "{solution}" not in text


def test_the_image_is_sent_where_asked(files, tmp_path):
    source, out = files
    Image.new("RGB", (28, 28)).save(tmp_path / "0.png")
    with Server(lambda *_: (200, {}, chat(REPLY))) as server:
        assert run("extract", source, out, "--url", server.url, "--model", "m", "--image", "--limit", "2") == 1
    (request,) = server.requests
    picture, text = request["messages"][0]["content"]
    assert (
        picture["image_url"]["url"]
        == "data:image/png;base64," + base64.b64encode((tmp_path / "0.png").read_bytes()).decode()
    )
    assert "Find x of 0." in text["text"]
    (failed,) = read(tmp_path / "out.jsonl.failed.jsonl")
    assert failed["row"] == 1 and "1.png" in failed["reason"]


def test_refine_by_model_keeps_the_number_of_groups(tmp_path, capsys):
    rows = [
        row | {"key_steps": {"Steps": [["So we see that AD is a median."], ["x = 3", "x=3"]]}} for row in make_rows(3)
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    replies = ['{"Steps": [["AD median"], ["x = 3", "So x = 3."]]}', '{"Steps": [["all in one"]]}', "I cannot."]
    with Server(lambda request, number: (200, {}, chat(replies[number - 1]))) as server:
        assert run("refine", source, out, "--url", server.url, "--model", "m", "--concurrency", "1") == 0
        assert '[["AD is a median"], ["x = 3"]]' in server.requests[0]["messages"][0]["content"]  # the rules come first
    by_rule = [["AD is a median"], ["x = 3"]]
    assert [row["key_steps"]["Steps"] for row in read(out)] == [[["AD median"], ["x = 3"]], by_rule, by_rule]
    assert "2 refined by rule alone" in capsys.readouterr().err


def test_augment_by_model_adds_to_the_rules(tmp_path, capsys):
    rows = [row | {"key_steps": {"Steps": [["AD is a median"], ["x = 3"]]}} for row in make_rows(2)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    replies = ['{"Steps": [["median AD", "AD is a median"], ["x is 3"]]}', "no"]
    with Server(lambda request, number: (200, {}, chat(replies[number - 1]))) as server:
        options = ["--url", server.url, "--model", "m", "--concurrency", "1", "--max-alternatives", "4"]
        assert run("augment", source, out, *options) == 0
    first, second = (row["key_steps"]["Steps"] for row in read(out))
    assert first[0] == ["AD is a median", "median AD"]
    assert first[1][:3] == ["x = 3", "x is 3", "3 = x"] and len(first[1]) == 4
    assert second[0] == ["AD is a median"] and second[1][:2] == ["x = 3", "3 = x"]
    assert "1 augmented by rule alone" in capsys.readouterr().err


# --- the other commands ----------------------------------------------------------------------------------------------


def test_the_way_without_a_model(files, capsys):
    source, out = files
    short, more = out.with_name("short.jsonl"), out.with_name("more.json")
    assert run("rules", source, out) == run("refine", out, short) == run("augment", short, more) == 0
    assert run("lint", more, "--strict") == 1  # "AD is a median" is in every solution here
    assert "'AD is a median' is in 5 other rows' solutions" in capsys.readouterr().out
    assert run("lint", more, "--strict", "--common-share", "1") == 0
    assert "0 findings in 0 of 6 rows" in capsys.readouterr().out


def test_rows_without_key_steps_fail_where_they_are_needed(files):
    source, out = files
    assert run("refine", source, out) == run("augment", source, out.with_name("b.jsonl")) == 1
    assert all("'key_steps'" in one["reason"] for one in read(out.with_name("out.jsonl.failed.jsonl")))


def test_convert_on_files(tmp_path):
    rows = [
        {"image": "a.png", "question": "Q", "solution": "S", "raw": REPLY},
        {"image": "a.png", "question": "Q", "solution": "S", "raw": "nothing"},
        {"image": "a.png", "question": "Q", "solution": "S"},
    ]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert run("convert", source, out, "--field", "raw") == 1
    made = read(out)
    assert made[0]["problem"] == "Q" and made[0]["key_steps"]["Steps"][1] == ["x = 3"]
    assert made[1:] == rows[1:]


def test_lint_names_file_row_and_group(tmp_path, capsys):
    good = make_rows(2)[1]
    rows = [good | {"key_steps": {"Steps": ["x = 1", "x = 9"]}}, good | {"key_steps": {"Steps": ["\ud800é"]}}, good]
    source = write(tmp_path / "in.jsonl", rows)
    with open(source, "a") as file:
        file.write("{oops\n")
    assert run("lint", source) == 0
    out = capsys.readouterr().out
    assert f"{source}, row 0, group 1: absent: ['x = 9']" in out
    assert f"{source}, row 2: missing:" in out and f"{source}, row 3: unusable: not JSON" in out
    assert "findings in 4 of 4 rows" in out
    assert run("lint", source, "--json", "--strict") == 1
    found = json.loads(capsys.readouterr().out)
    assert {"file": str(source), "row": 0, "group": 1, "kind": "absent"}.items() <= found[0].items()
    assert [one["row"] for one in found] == sorted(one["row"] for one in found)


@pytest.mark.parametrize("command", ["extract", "rules", "refine", "augment", "convert", "lint"])
def test_help_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as ended:
        run(command, "--help")
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m r1vl_jax.keysteps {command} " in out.partition("Example:")[2]
    example = out.partition("Example:\n")[2].splitlines()[0].split()[3:]
    from r1vl_jax.keysteps.__main__ import _parser

    assert _parser().parse_args(example).command == command


@pytest.mark.parametrize(
    "args",
    [["--limit", "0"], ["--limit", "-1"], ["--limit", "x"], ["--per-step", "-1"], ["--nonsense"], []],
)
def test_bad_arguments(files, capsys, args):
    source, out = files
    with pytest.raises(SystemExit) as ended:
        run("rules", source, *([out] if args else []), *args)
    assert ended.value.code == 2
