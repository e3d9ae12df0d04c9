"""The judge over real HTTP: both orders, scores, retries, the cache and the key."""

import itertools
import json
import re
import sys
import threading
from pathlib import Path

import pytest
from chat_server import Server, completion, error, serving

from exo import judge
from exo.cli import console
from exo.evaluation import judge_client

KEY = "sk-secret-4711"
TEMPLATE = 'Q: {prompt}\nA: {a}\nB: {b}\nSay "A", "B" or "tie".'


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setattr(judge_client, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(judge.KEY_VARIABLE, raising=False)


def rows(path: Path, content: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return str(path)


def samples(tmp_path: Path, name: str, answers: list[str]) -> str:
    content = [{"prompt": f"p{i}", "completions": [answer]} for i, answer in enumerate(answers)]
    return rows(tmp_path / f"{name}.jsonl", content)


@pytest.fixture
def files(tmp_path):
    """Write the answers of two systems; system a gives the longer one to three of four prompts."""
    a = samples(tmp_path, "a", ["longer", "longer", "longer", "s"])
    b = samples(tmp_path, "b", ["short", "short", "short", "longer"])
    return ["--a", a, "--b", b]


def run(tmp_path: Path, server: Server | str, *argv: str, name: str = "run") -> int:
    template = tmp_path / "template.txt"
    if not template.exists():
        template.write_text(TEMPLATE)
    url = server if isinstance(server, str) else server.url
    flags = {"template": template, "endpoint": url, "model": "m", "output_dir": tmp_path / name, "timeout": 5}
    return judge.main([f"--{key}={value}" for key, value in flags.items()] + ["--overwrite_output_dir", *argv])


def result(tmp_path: Path, name: str = "run") -> dict:
    return json.loads((tmp_path / name / "judge.json").read_text())


def verdicts(tmp_path: Path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "run" / "verdicts.jsonl").read_text().splitlines()]


def longer(question: str):
    a, b = re.findall(r"^[AB]: (.*)$", question, re.MULTILINE)
    return completion(f"Comparison: one is longer.\n**Preferred:** {'A' if len(a) > len(b) else 'B'}")


def test_help_and_a_file_of_options(tmp_path, files, capsys):
    with pytest.raises(SystemExit) as stop:
        judge.main(["--help"])
    assert stop.value.code == 0 and "{prompt}, {a}, {b}, {reference}" in capsys.readouterr().out
    file = tmp_path / "judge.yaml"
    file.write_text("limit: 1\ntemplate: dialogue\n")
    with serving(lambda _: completion("A")) as server:
        flags = [f"--endpoint={server.url}", "--model=m", f"--output_dir={tmp_path / 'run'}"]
        assert judge.main(["--config", str(file), *files, *flags]) == 0
    assert len(server.questions) == 2 and "[Conversation]" in server.questions[0]


# Results.


def test_win_rate_of_a_judge_that_prefers_the_longer(tmp_path, files, capsys):
    with serving(longer) as server:
        assert run(tmp_path, server, *files) == 0
    summary = result(tmp_path)
    assert summary["win_rate"]["mean"] == 0.75 and summary["win_rate"]["low"] < 0.75 < summary["win_rate"]["high"]
    assert (summary["wins"], summary["ties"], summary["losses"], summary["prompts"]) == (3, 0, 1, 4)
    assert (summary["position_bias_rate"], summary["first_position_share"]) == (0.0, 0.5)
    assert summary["undecided"] == {"unanswered": 0, "unreadable": 0, "pairs_left_out": 0}
    assert "win rate 75.0%" in capsys.readouterr().out
    assert [v["winner"] for v in verdicts(tmp_path)] == ["a"] * 6 + ["b"] * 2
    assert [v["order"] for v in verdicts(tmp_path)] == ["ab", "ba"] * 4
    request = server.requests[0]
    assert (request["path"], request["temperature"], request["model"]) == ("/v1/chat/completions", 0, "m")
    assert "finished" in json.loads((tmp_path / "run" / "run.json").read_text())


def test_each_pair_is_shown_in_both_orders(tmp_path, files):
    with serving(longer) as server:
        run(tmp_path, server, *files, "--limit", "none")
    shown = [re.findall(r"^(?:Q|A|B): (.*)$", question, re.MULTILINE) for question in server.questions]
    expected = [["p0", "longer", "short"], ["p0", "short", "longer"], ["p3", "s", "longer"], ["p3", "longer", "s"]]
    assert sorted(texts for texts in shown if texts[0] in ("p0", "p3")) == sorted(expected) and len(shown) == 8


def test_a_judge_that_always_prefers_the_first(tmp_path, files):
    with serving(lambda _: completion("Preferred: A")) as server:
        assert run(tmp_path, server, *files) == 0
    summary = result(tmp_path)
    assert summary["win_rate"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "prompts": 4} and summary["ties"] == 4
    assert (summary["position_bias_rate"], summary["first_position_share"]) == (1.0, 1.0)


def test_a_tie_in_one_order_counts_a_quarter(tmp_path):
    files = ["--a", samples(tmp_path, "a", ["x"]), "--b", samples(tmp_path, "b", ["y"])]
    with serving(lambda question: completion("tie" if "A: x" in question else "B")) as server:
        assert run(tmp_path, server, *files) == 0
    assert result(tmp_path)["win_rate"]["mean"] == 0.75 and result(tmp_path)["position_bias_rate"] == 0
    assert result(tmp_path)["first_position_share"] == 0


def test_a_pair_counts_only_if_both_orders_are_decided(tmp_path, files):
    """Check that one order does not decide p0 alone, when the other order has no verdict."""

    def reply(question):
        return completion("I cannot say.") if "Q: p0\nA: longer" in question else longer(question)

    with serving(reply) as server:
        assert run(tmp_path, server, *files) == 0
    summary = result(tmp_path)
    assert (summary["win_rate"]["mean"], summary["win_rate"]["prompts"]) == (2 / 3, 3)
    assert summary["undecided"] == {"unanswered": 0, "unreadable": 1, "pairs_left_out": 1}
    assert verdicts(tmp_path)[0]["answer"] == "I cannot say." and verdicts(tmp_path)[0]["winner"] is None
    assert len(server.requests) == 9  # the unreadable answer is requested once more


def test_categories_and_references(tmp_path, files, capsys):
    references = [{"prompt": f"p{i}", "completion": f"ref{i}", "category": "rp" if i else "cw"} for i in range(4)]
    path = rows(tmp_path / "references.jsonl", references[1:] + references[:1])
    template = tmp_path / "template.txt"
    template.write_text(TEMPLATE + "{reference}")
    with serving(longer) as server:
        assert run(tmp_path, server, *files) == 2 and "--references: expected a file" in capsys.readouterr().err
        assert run(tmp_path, server, *files, "--references", path) == 0
    assert all(f"ref{re.search('Q: p(.)', q)[1]}" in q for q in server.questions)
    categories = result(tmp_path)["by_category"]
    assert categories["cw"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "prompts": 1}
    assert (categories["rp"]["mean"], categories["rp"]["prompts"]) == (2 / 3, 3)


def test_only_shared_prompts_are_judged(tmp_path, capsys):
    a = rows(tmp_path / "a.jsonl", [{"prompt": p, "completions": [f"long {p} {i}"]} for i, p in enumerate("xxyz")])
    b = rows(tmp_path / "b.jsonl", [{"prompt": p, "chosen": f"{p}{i}", "rejected": "r"} for i, p in enumerate("xwx")])
    with serving(longer) as server:
        assert run(tmp_path, server, "--a", a, "--b", b) == 0
        assert {("long x 0" in q, "x0" in q) for q in server.questions} == {(True, True), (False, False)}
        out = capsys.readouterr().out
        assert "a: 2 of 4 prompts left out" in out and "b: 1 of 3 prompts left out" in out
        other = rows(tmp_path / "c.jsonl", [{"prompt": "else", "completion": "c"}])
        assert run(tmp_path, server, "--a", a, "--b", other) == 2
    assert "expected prompts that all files share; found none" in capsys.readouterr().err


def test_limit_and_samples_are_chosen_by_seed(tmp_path):
    def questions(*argv: str) -> set[str]:
        with serving(longer) as server:
            cache = tmp_path / f"cache{next(count)}"
            assert run(tmp_path, server, *files, f"--cache={cache}", *argv) == 0
        return set(server.questions)

    count = itertools.count()
    content = [{"prompt": f"p{i}", "completions": [f"{i}:{k}" for k in range(4)]} for i in range(9)]
    files = ["--a", rows(tmp_path / "a.jsonl", content), "--b", samples(tmp_path, "b", ["b"] * 9)]
    five = questions("--limit=5")
    assert len(five) == 10 and five == questions("--limit=5") and five < questions("--limit=7")
    assert five != questions("--limit=5", "--seed=1")
    assert len(questions("--samples_per_prompt=3")) == 2 * 3 * 9
    assert result(tmp_path)["prompts"] == result(tmp_path)["win_rate"]["prompts"] == 9


def test_too_few_samples_per_prompt_are_refused(tmp_path, capsys):
    a = rows(tmp_path / "a.jsonl", [{"prompt": "p0", "completions": ["x", "y"]}])
    assert run(tmp_path, "http://127.0.0.1:1", "--a", a, "--b", a, "--samples_per_prompt=3") == 2
    assert "a.jsonl:1: expected one completion, or at least 3; got 2" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Errors of the server, and the key.


def test_server_errors_are_retried(tmp_path, files):
    calls, lock = {}, threading.Lock()

    def reply(question):
        with lock:
            calls[question] = calls.get(question, 0) + 1
        return longer(question) if calls[question] > 2 else error([500, 429][calls[question] - 1], "busy")

    with serving(reply) as server:
        assert run(tmp_path, server, *files) == 0
    assert result(tmp_path)["win_rate"]["mean"] == 0.75 and set(calls.values()) == {3}


@pytest.mark.parametrize("bad", [None, (200, "<html>", {}), (200, '{"choices": []}', {}), (200, "[" * 99999, {})])
def test_invalid_responses_are_retried(tmp_path, files, bad):
    calls = itertools.count()
    with serving(lambda question: bad if next(calls) == 0 else longer(question)) as server:
        assert run(tmp_path, server, *files) == 0
    assert len(server.requests) == 9 and result(tmp_path)["undecided"]["unanswered"] == 0


def test_retry_after_is_respected(tmp_path, files, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda self, timeout=None: waits.append(timeout))
    calls = itertools.count()
    with serving(lambda q: error(429, Retry_After="77") if next(calls) == 0 else longer(q)) as server:
        run(tmp_path, server, *files, "--concurrency=1")
    assert waits.count(77) == 1


@pytest.mark.parametrize(
    ("value", "seconds"), [("3", 3), ("99999999999", 300), ("Mon, 01 Jan 2001 00:00:00 GMT", 0), ("soon", 0), ("-1", 0)]
)
def test_values_of_retry_after(value, seconds):
    assert judge_client.retry_after_seconds(value) == seconds


def test_a_wrong_key_stops_at_once(tmp_path, files, monkeypatch, capsys):
    """Check also that the key is in no output and in no file, even if the server repeats it."""
    monkeypatch.setenv(judge.KEY_VARIABLE, KEY + "\n")
    with serving(lambda _: error(401, f"Incorrect\nkey {KEY}")) as server:
        assert run(tmp_path, server, *files, "--concurrency=1") == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 1 and "HTTP 401 (Incorrect key ***); check the key" in err
    assert len(server.requests) < 8 and server.requests[0]["headers"]["Authorization"] == f"Bearer {KEY}"
    assert KEY not in out + err and not (tmp_path / "run" / "judge.json").exists()
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_the_key_is_in_no_file_of_a_good_run(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(lambda _: completion(f"You sent {KEY}\nA")) as server:
        assert run(tmp_path, server, *files, "--api_key_env=MY_KEY") == 0
    assert KEY not in "".join(capsys.readouterr()) and "You sent ***" in verdicts(tmp_path)[0]["answer"]
    assert not any(KEY in file.read_text() for file in tmp_path.rglob("*") if file.is_file())


def test_no_key_is_sent_if_none_is_set(tmp_path, files, monkeypatch):
    """Check that the client library sends none that it finds in the environment either."""
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}")
    with serving(longer) as server:
        run(tmp_path, server, *files)
    assert server.requests and not any("Authorization" in request["headers"] for request in server.requests)


def test_a_missing_client_library_is_one_line(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert run(tmp_path, "http://127.0.0.1:1", *files) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "pip install 'exo-kernels[judge]'" in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("variable", [KEY, "NOT_SET_ANYWHERE", "BAD_VALUE"])
def test_an_unusable_key_is_not_printed(tmp_path, files, monkeypatch, capsys, variable):
    monkeypatch.setenv("BAD_VALUE", f"{KEY}\r\nX-Other: 1")
    assert run(tmp_path, "http://127.0.0.1:1", *files, f"--api_key_env={variable}") == 2
    err = capsys.readouterr().err
    assert "--api_key_env: " in err and variable not in err and KEY not in err


def test_the_key_does_not_follow_a_redirect(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setenv(judge.KEY_VARIABLE, KEY)
    with serving(longer) as other, serving(lambda _: (302, "", {"Location": other.url})) as server:
        assert run(tmp_path, server, *files) == 1
    assert not other.requests and "HTTP 302" in capsys.readouterr().err


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000/v1",
        "ftp://h/v1",
        "http://h:port/v1",
        f"http://me:{KEY}@h/v1",
        f"http://h/v1?key={KEY}",
        "http://x..y/v1",
        f"http://{'h' * 64}/v1",
        "http://-\u00fc/v1",
    ],
)
def test_an_endpoint_that_is_no_plain_address_is_refused(tmp_path, files, capsys, url):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, url, *files)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--endpoint: expected http://host:port/v1" in err and KEY not in err


def test_requests_to_a_hanging_server_time_out(tmp_path, files, capsys):
    release = threading.Event()

    def reply(question):
        if "Q: p0" in question:
            release.wait(10)
        return longer(question)

    with serving(reply) as server:
        assert run(tmp_path, server, *files, "--timeout=0.3", "--retries=1") == 0
        release.set()
    assert result(tmp_path)["undecided"] == {"unanswered": 2, "unreadable": 0, "pairs_left_out": 1}
    assert verdicts(tmp_path)[0]["reason"] == "timed out" and server.questions.count(server.questions[0]) <= 2
    assert "left out: 1 pairs, for 2 requests without an answer" in capsys.readouterr().out
    assert len((tmp_path / "judge-cache.jsonl").read_text().splitlines()) == 6  # failures are not cached


def test_an_unreachable_server(tmp_path, files, capsys):
    with serving(longer) as server:
        url = server.url
    assert run(tmp_path, url, *files, "--retries=1") == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "8 requests in a row were not answered" in err and "refused" in err
    assert result(tmp_path)["win_rate"] is None and result(tmp_path)["undecided"]["unanswered"] == 8
    assert "finished" not in json.loads((tmp_path / "run" / "run.json").read_text())


def test_the_answers_of_a_server_that_stops_are_cached(tmp_path, capsys):
    files = ["--a", samples(tmp_path, "a", ["longer"] * 30), "--b", samples(tmp_path, "b", ["short"] * 30)]
    calls, down = itertools.count(), [True]
    with serving(lambda q: None if down and next(calls) >= 20 else longer(q)) as server:
        assert run(tmp_path, server, *files, "--retries=0", "--concurrency=2") == 1
        num_requests = len(server.requests)
        assert "8 requests in a row were not answered" in capsys.readouterr().err and num_requests < 35
        down.clear()
        assert run(tmp_path, server, *files) == 0
        assert len(server.requests) == num_requests + 60 - 20 and result(tmp_path)["win_rate"]["mean"] == 1


def test_unreadable_answers_give_no_win_rate(tmp_path, files, capsys):
    with serving(lambda _: completion(None)) as server:
        assert run(tmp_path, server, *files) == 1
    assert "no pair was decided in both orders" in capsys.readouterr().err
    assert len(verdicts(tmp_path)) == 8 and result(tmp_path)["win_rate"] is None
    assert result(tmp_path)["undecided"] == {"unanswered": 0, "unreadable": 8, "pairs_left_out": 4}


# Judges with other settings.


def test_a_truncated_answer_decides_nothing_and_is_not_cached(tmp_path, files, capsys):
    """Check an answer that chooses A early in its reasoning, and might have chosen B in the end."""
    cut = [True]

    def reply(question):
        return (
            completion("Preferred: A\nBut on reflection", "length") if cut and "Q: p0" in question else longer(question)
        )

    with serving(reply) as server:
        assert run(tmp_path, server, *files) == 0
        assert len(server.requests) == 8, "a second answer would be cut off too"
        summary = result(tmp_path)
        assert summary["undecided"]["pairs_left_out"] == 1 and summary["truncated"] == 2
        assert verdicts(tmp_path)[0] | {"reason": "cut off before its end", "choice": None} == verdicts(tmp_path)[0]
        assert "2 answers without a choice (2 of them cut off: raise --max_tokens)" in capsys.readouterr().out
        cut.clear()
        assert run(tmp_path, server, *files) == 0
    assert len(server.requests) == 10 and result(tmp_path)["win_rate"]["mean"] == 0.75


@pytest.mark.parametrize(
    ("refused", "message", "sent"),
    [
        ("temperature", "Unsupported value: 'temperature' does not support 0 with this model.", {"max_tokens": 512}),
        (
            "max_tokens",
            "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
            {"temperature": 0, "max_completion_tokens": 512},
        ),
    ],
)
def test_a_setting_that_the_server_refuses_is_left_out(tmp_path, files, monkeypatch, capsys, refused, message, sent):
    monkeypatch.setattr(console, "_warned", set())
    with serving(longer) as server:
        server.refuses = lambda body: error(400, message) if refused in body else None
        assert run(tmp_path, server, *files, "--concurrency=4") == 0
        assert result(tmp_path)["win_rate"]["mean"] == 0.75
        assert capsys.readouterr().out.count(f"the judge does not take {refused}=") == 1
        answered = [request for request in server.requests if refused not in request]
        assert len(answered) == 8 and len(server.requests) <= 8 + 4
        names = ("temperature", "max_tokens", "max_completion_tokens")
        assert all({n: r[n] for n in names if n in r} == sent for r in answered)
        assert run(tmp_path, server, *files) == 0
        assert len(server.requests) <= 12, "the cache contains the requests as they were sent"
        server.refuses = lambda body: error(400, "context too long")
        assert run(tmp_path, server, *files, "--seed=1", "--model=other") == 1
    assert "HTTP 400 (context too long); the server refuses this request" in capsys.readouterr().err


def test_options_of_the_judge_go_into_the_request(tmp_path, files, capsys):
    options = '{"reasoning_effort": "low", "temperature": null, "max_tokens": 9}'
    with serving(longer) as server:
        assert run(tmp_path, server, *files, f"--judge_options={options}") == 0
        (shape,) = {tuple(sorted(r.items())) for r in ({k: v for k, v in q.items() if k != "headers"} | {"messages": 0}
                                                     for q in server.requests)}  # fmt: skip
        assert dict(shape) == {
            "reasoning_effort": "low", "max_tokens": 9, "model": "m", "messages": 0, "path": "/v1/chat/completions",
        }  # fmt: skip
        run(tmp_path, server, *files)
        assert len(server.requests) == 16, "other options give another cache key"
    for bad in ("[1]", "low", '{"messages": []}', '{"model": "x"}', "[" * 99999, '{"x": NaN}', '{"x": "\\ud800"}'):
        with pytest.raises(SystemExit):
            run(tmp_path, "http://127.0.0.1:1", *files, f"--judge_options={bad}")
        assert "--judge_options: expected a JSON object of request parameters" in capsys.readouterr().err


def test_the_same_question_is_sent_once(tmp_path):
    """Check two systems of one answer each and three samples of each prompt: the same pair three times."""
    files = ["--a", samples(tmp_path, "a", ["longer", "s"]), "--b", samples(tmp_path, "b", ["short", "longer"])]
    with serving(longer) as server:
        assert run(tmp_path, server, *files, "--samples_per_prompt=3") == 0
    assert len(server.questions) == len(set(server.questions)) == 4
    assert len(verdicts(tmp_path)) == 12 and result(tmp_path)["win_rate"]["mean"] == 0.5


# The cache.


def test_cached_questions_are_not_sent(tmp_path, files):
    with serving(longer) as server:
        run(tmp_path, server, *files, "--limit=2")
        run(tmp_path, server, *files, "--limit=2")
        assert len(server.requests) == 4
        run(tmp_path, server, *files, name="other")
        assert len(server.requests) == 8 and result(tmp_path, "other")["win_rate"]["mean"] == 0.75
        run(tmp_path, server, *files, "--model=another")
        (tmp_path / "template.txt").write_text(TEMPLATE + " Please.")
        run(tmp_path, server, *files)
    assert len(server.requests) == 24


def test_unreadable_answers_are_requested_again(tmp_path, files):
    with serving(lambda q: completion("?") if "A: s\n" in q else longer(q)) as server:
        run(tmp_path, server, *files)
        assert len(server.requests) == 9 and result(tmp_path)["undecided"]["unreadable"] == 1
    with serving(longer) as server:
        run(tmp_path, server, *files)
    assert len(server.requests) == 8, "answers of another server are not reused"


def test_undecided_answers_are_requested_again_by_the_next_run(tmp_path, files, capsys):
    unreadable = [True]
    with serving(lambda q: completion("?") if unreadable and "A: s\n" in q else longer(q)) as server:
        run(tmp_path, server, *files, "--retries=0")
        assert len(server.requests) == 8 and result(tmp_path)["undecided"]["unreadable"] == 1
        unreadable.clear()
        assert run(tmp_path, server, *files) == 0
    assert len(server.requests) == 9 and result(tmp_path)["cached"] == 7
    assert "7 answers are cached from an earlier run" in capsys.readouterr().out


def test_identical_answers_are_counted(tmp_path):
    files = ["--a", samples(tmp_path, "a", ["same", "longer"]), "--b", samples(tmp_path, "b", ["same", "short"])]
    with serving(longer) as server:
        run(tmp_path, server, *files)
    assert result(tmp_path)["identical"] == 1


def test_a_half_written_line_of_the_cache_is_removed(tmp_path, files):
    cache = tmp_path / "judge-cache.jsonl"
    with serving(longer) as server:
        run(tmp_path, server, *files)
        complete = cache.read_bytes()
        cache.write_bytes(complete[:-20])
        assert run(tmp_path, server, *files) == 0
        assert len(server.requests) == 9 and sorted(cache.read_bytes().split()) == sorted(complete.split())
        cache.write_bytes(complete + b'{"k')
        assert run(tmp_path, server, *files) == 0
    assert len(server.requests) == 9 and cache.read_bytes() == complete


@pytest.mark.parametrize("content", ['{"prompt": "p", "completions": ["x"]}\n', "notes without an end of line"])
def test_a_file_that_is_no_cache_is_left_alone(tmp_path, files, capsys, content):
    notes = tmp_path / "mine"
    notes.write_text(content)
    assert run(tmp_path, "http://127.0.0.1:1", *files, f"--cache={notes}") == 2
    assert "mine:1: not a line of a cache of verdicts" in capsys.readouterr().err and notes.read_text() == content
    assert not (tmp_path / "run").exists()  # nor was the directory of an earlier run replaced


def test_a_cache_in_the_output_directory_is_refused(tmp_path, files, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "http://127.0.0.1:1", *files, f"--cache={tmp_path / 'run' / 'cache.jsonl'}")
    assert "--cache: expected a file outside --output_dir" in capsys.readouterr().err
