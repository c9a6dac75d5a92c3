"""A server on this machine, and clients of every kind."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as sync_serve

from roadvla import cli
from roadvla.errors import UserError
from roadvla.evaluation.evaluate import evaluate
from roadvla.evaluation.files import read_evaluation
from roadvla.policy import BACKBONE_FOLDER, load_backbone
from roadvla.serving.client import RemotePolicy
from roadvla.serving.messages import MAX_BYTES, pack, unpack
from roadvla.serving.notices import Warnings
from roadvla.serving.server import PolicyServer
from roadvla.serving.settings import Serving
from roadvla.types import Observation

PROMPT = "put carrot on plate"


class Slow:
    """The small VLA, which counts its passes and can be held up."""

    def __init__(self) -> None:
        self.policy = load_backbone("cpu")
        self.rows: list[int] = []
        self.free = threading.Event()
        self.free.set()

    def __getattr__(self, name: str) -> object:
        return getattr(self.policy, name)

    def tokenize(self, instructions):
        if "bad" in instructions:
            raise UserError("no such instruction")
        return self.policy.tokenize(instructions)

    def act(self, observation, **options):
        self.free.wait(30)
        self.rows.append(len(observation.image))
        return self.policy.act(observation, **options)


@contextmanager
def serving(policy: object, token: str | None = None, **settings: object) -> Iterator[int]:
    """Run a server in a thread and give its port."""
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    ports: list[int] = []

    async def run() -> None:
        about = {
            "policy": "tiny",
            "checkpoint": "here",
            "iteration": None,
            "env_steps": None,
            "norm_stats": policy.norm_stats.to_dict(),
        }
        async with PolicyServer(policy, about, Serving(port=0, **settings), token) as server:
            ports.append(server.port)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(run()))
    thread.start()
    try:
        assert ready.wait(20)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(20)
        assert not thread.is_alive()
        loop.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with serving(load_backbone("cpu")) as found:
        yield found


def frames(seed: int, count: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, 48, 48, 3), dtype=np.uint8)


@contextmanager
def client(port: int, **options: object) -> Iterator[ClientConnection]:
    with connect(f"ws://127.0.0.1:{port}", compression=None, proxy=None, **options) as ours:
        greeting = ours.recv()
        assert unpack(greeting)["protocol"] == 1
        yield ours


def ask(ours: ClientConnection, **message: object) -> dict | str:
    ours.send(pack(message))
    answer = ours.recv(timeout=30)
    return answer if isinstance(answer, str) else unpack(answer)


def test_the_answer_is_what_the_policy_does_here(port: int) -> None:
    policy, image = load_backbone("cpu"), frames(0, 3)
    uniform = np.random.default_rng(1).random((3, 7), dtype=np.float32)
    with client(port) as ours:
        answer = ask(ours, image=image, prompt=[PROMPT] * 3, uniform=uniform, temperature=0.7)
    here = policy.act(
        Observation(torch.from_numpy(image), policy.tokenize([PROMPT] * 3)),
        temperature=0.7,
        uniform=torch.from_numpy(uniform),
    )
    np.testing.assert_array_equal(answer["action_tokens"], here.action_tokens)
    np.testing.assert_array_equal(answer["log_probs"], here.log_probs)
    np.testing.assert_array_equal(answer["value"], here.value)
    decoded = policy.decode(here.action_tokens)[:, None]
    np.testing.assert_array_equal(answer["actions"], decoded)
    assert set(answer["server_timing"]) == {"infer_ms", "wait_ms"}


def test_one_frame_gives_a_chunk_of_one_action(port: int) -> None:
    with client(port) as ours:
        answer = ask(ours, **{"observation/image": frames(1)[0], "prompt": PROMPT})
    assert answer["actions"].shape == (1, 7)
    assert answer["actions"].dtype == np.float32


def test_clients_share_passes_and_none_gets_another_s_answer() -> None:
    policy = Slow()
    with serving(policy, max_wait_ms=50.0) as port, ThreadPoolExecutor(16) as pool:

        def one(seed: int) -> tuple[int, dict]:
            with client(port) as ours:
                return seed, ask(ours, image=frames(seed)[0], prompt=PROMPT)

        answers = dict(pool.map(one, range(48)))
    assert sum(policy.rows) == 48
    assert max(policy.rows) > 4
    for seed, answer in answers.items():
        alone = policy.policy.act(
            Observation(torch.from_numpy(frames(seed)), policy.tokenize([PROMPT])), temperature=0.0
        )
        np.testing.assert_allclose(answer["value"], alone.value[0], atol=1e-5)
        # Another batch size may round a tie otherwise; values tell 48 noises apart.
        assert (answer["action_tokens"] == alone.action_tokens[0].numpy()).mean() > 0.5


def test_different_temperatures_do_not_share_a_pass() -> None:
    policy = Slow()
    policy.free.clear()
    with serving(policy, max_wait_ms=200.0) as port, ThreadPoolExecutor(4) as pool:

        def one(temperature: float) -> dict:
            with client(port) as ours:
                return ask(ours, image=frames(0)[0], prompt=PROMPT, temperature=temperature, seed=1)

        waiting = [pool.submit(one, heat) for heat in (0.0, 1.0, 0.0, 1.0)]
        time.sleep(0.3)
        policy.free.set()
        answers = [job.result(30) for job in waiting]
    assert sum(policy.rows) == 4
    np.testing.assert_array_equal(answers[0]["actions"], answers[2]["actions"])
    np.testing.assert_array_equal(answers[1]["actions"], answers[3]["actions"])


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ("a text", "expected a binary message"),
        (b"\xc1", "not readable"),
        (pack({"prompt": PROMPT}), "'observation/image' is missing"),
        (pack({"image": np.zeros((64, 64, 3), np.uint8), "prompt": PROMPT}), "error: "),
    ],
)
def test_a_wrong_message_is_answered_and_the_next_one_is_fine(
    port: int, sent: str | bytes, words: str
) -> None:
    with client(port) as ours:
        ours.send(sent)
        answer = ours.recv(timeout=30)
        assert isinstance(answer, str)
        assert words in answer
        assert len(answer) < 400
        assert ask(ours, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)


def test_a_bad_frame_does_not_spoil_the_pass_it_shares() -> None:
    policy = Slow()
    policy.free.clear()
    with serving(policy, max_wait_ms=300.0) as port, ThreadPoolExecutor(3) as pool:

        def one(prompt: str) -> dict | str:
            with client(port) as ours:
                return ask(ours, image=frames(3)[0], prompt=prompt)

        waiting = [pool.submit(one, text) for text in (PROMPT, "bad", PROMPT)]
        time.sleep(0.3)
        policy.free.set()
        good, bad, other = (job.result(30) for job in waiting)
    assert bad == "error: no such instruction"
    np.testing.assert_array_equal(good["actions"], other["actions"])


def test_a_message_that_is_too_large_ends_the_connection_only(port: int) -> None:
    with client(port) as ours:
        ours.send(b"\0" * (MAX_BYTES + 1))
        with pytest.raises(ConnectionClosed):
            ours.recv(timeout=30)
    with client(port) as ours:
        assert ask(ours, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)


def test_whoever_leaves_or_dawdles_holds_nobody_up(port: int) -> None:
    for _ in range(20):  # leave in the middle of everything
        with client(port) as ours:
            ours.send(pack({"image": frames(0)[0], "prompt": PROMPT}))
            ours.socket.close()
    half = socket.create_connection(("127.0.0.1", port))
    half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")  # and nothing more
    with client(port) as ours:
        assert ask(ours, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)
    half.close()


def test_more_than_may_wait_are_told_so() -> None:
    policy = Slow()
    policy.free.clear()
    with serving(policy, max_waiting=2, max_batch=1) as port, ThreadPoolExecutor(8) as pool:

        def one(seed: int) -> dict | str:
            with client(port) as ours:
                return ask(ours, image=frames(seed)[0], prompt=PROMPT)

        waiting = [pool.submit(one, seed) for seed in range(8)]
        time.sleep(1.0)
        policy.free.set()
        answers = [job.result(30) for job in waiting]
    busy = [answer for answer in answers if isinstance(answer, str)]
    assert 4 <= len(busy) <= 6
    assert all("busy: 2 requests are waiting" in answer for answer in busy)


def test_more_clients_than_may_come_are_refused() -> None:
    with serving(load_backbone("cpu"), max_clients=2) as port:
        address = f"ws://127.0.0.1:{port}"
        with client(port), client(port), pytest.raises(InvalidStatus, match="503"):
            connect(address, proxy=None)
        with client(port) as ours:
            assert ask(ours, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)


@contextmanager
def silent(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Open sockets that never say a word."""
    with ExitStack() as lines:
        yield [
            lines.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            for _ in range(count)
        ]


def test_sockets_that_stay_silent_keep_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadvla.serving.sockets.SILENT", 20)
    with serving(load_backbone("cpu"), max_clients=2) as port, client(port) as first:
        with silent(port, 150) as lines:
            assert _health(port) == (200, b"OK\n")
            with client(port) as ours:
                assert ask(ours, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)
            closed = [line for line in lines if _closed(line)]
            # The oldest went; who was in conversation before they came is still there.
            assert closed == lines[: len(closed)]
            assert 150 - 20 <= len(closed) <= 150 - 20 + 4
        assert ask(first, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)


def _closed(line: socket.socket) -> bool:
    line.settimeout(0.05)
    try:
        return line.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionResetError:
        return True


def test_who_does_not_say_what_it_wants_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roadvla.serving.server._OPEN_SECONDS", 0.3)
    with serving(load_backbone("cpu")) as port, silent(port, 1) as (line,):
        line.sendall(b"GET / HTTP/1.1\r\n")
        assert not _closed(line)
        time.sleep(1.0)
        assert _closed(line)


def test_a_hundred_clients_at_once_all_come_in() -> None:
    with serving(load_backbone("cpu"), max_clients=128) as port, ThreadPoolExecutor(100) as pool:
        together = threading.Barrier(100)

        def one(_: int) -> None:
            together.wait(30)
            with client(port, open_timeout=30):
                together.wait(30)

        list(pool.map(one, range(100)))


@contextmanager
def command(files: int, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Run the command in a process that may open so many files."""
    line = [sys.executable, "-m", "roadvla", "serve", str(BACKBONE_FOLDER), "--port", "0", *options]
    limited = ["bash", "-c", f'ulimit -n {files}; exec "$@"', "bash", *line]
    with subprocess.Popen(
        limited, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        try:
            yield server
        finally:
            server.kill()


def test_a_process_that_may_open_few_files_lasts() -> None:
    with command(500, "--max-clients", "20") as server:
        assert server.stdout is not None
        assert server.stderr is not None
        port = int(server.stdout.readline().split("ws://")[1].split()[0].rpartition(":")[2])
        with silent(port, 600):
            assert _health(port) == (200, b"OK\n")
            with client(port) as ours:
                assert ask(ours, image=frames(2)[0], prompt=PROMPT)["actions"].shape == (1, 7)
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr.read() == ""


def test_too_few_files_are_told_at_once() -> None:
    with command(120) as server:
        assert server.wait(60) == 2
        assert server.stderr is not None
        said = server.stderr.read()
    assert "and this process may open 120: raise `ulimit -n`, or pass a smaller --max-" in said
    assert said.count("\n") == 1


def test_warnings_do_not_fill_a_disk(capsys: pytest.CaptureFixture[str]) -> None:
    warnings = Warnings()
    for number in range(1000):
        warnings.warn(f"request {number}\nfailed")
    assert capsys.readouterr().err == "roadvla: warning: request 0 failed\n"
    warnings._next = 0.0
    try:
        raise OSError(24, "Too many open files")
    except OSError as error:
        context = {"message": "socket.accept() out of system resource", "exception": error}
        with closing(asyncio.new_event_loop()) as loop:
            warnings.of_loop(loop, context)
        warnings.logger().error("connection handler failed", exc_info=True)
    said = capsys.readouterr().err
    assert "out of system resource: OSError(24, 'Too many open files') (and 999 more" in said
    assert said.count("\n") == 1


def test_a_token_opens_and_only_the_right_one() -> None:
    with serving(load_backbone("cpu"), token="secret") as port:
        for headers in (None, {"Authorization": "Bearer other"}, {"Authorization": "Basic secret"}):
            with (
                pytest.raises(InvalidStatus, match="401"),
                client(port, additional_headers=headers),
            ):
                pass
        for kind in ("Bearer", "Api-Key"):
            with client(port, additional_headers={"Authorization": f"{kind} secret"}):
                pass
        assert _health(port) == (200, b"OK\n")
        with pytest.raises(UserError, match="ROADVLA_TOKEN"):
            RemotePolicy(f"remote://127.0.0.1:{port}")
        RemotePolicy(f"remote://127.0.0.1:{port}", "secret").close()


def test_the_health_check_is_plain_http(port: int) -> None:
    assert _health(port) == (200, b"OK\n")


def _health(port: int) -> tuple[int, bytes]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=10) as answer:
        return answer.status, answer.read()


def test_others_need_a_token_to_be_let_near() -> None:
    with pytest.raises(UserError, match=r"host '0\.0\.0\.0' lets others.*--token-file"):
        PolicyServer(load_backbone("cpu"), {}, Serving(host="0.0.0.0"))


# Evaluating what is served.


def test_a_served_policy_is_measured_as_it_would_be_here(port: int) -> None:
    options = {"env": "VR-UnseenTable", "split": "test", "episodes": 8, "num_envs": 4}
    policy = RemotePolicy(f"remote://127.0.0.1:{port}")
    there = evaluate(policy, **options)
    here = evaluate(load_backbone("cpu"), **options)
    policy.close()
    assert (there.success, there.grasped) == (here.success, here.grasped)
    assert there.events == here.events


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "roadvla", "serve", str(BACKBONE_FOLDER), "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        said = server.stdout.readline()
        address = said.split("ws://")[1].split()[0]
        wanted = ["eval", "--policy", f"remote://{address}", "--env", "VR-UnseenTable"]
        wanted += ["--episodes", "4", "--output", str(tmp_path / "out")]
        assert cli.main(wanted) == 0
        found = read_evaluation(tmp_path / "out" / "VR-UnseenTable_test.json")
        assert found.checkpoint == str(BACKBONE_FOLDER)
        server.terminate()
        assert server.wait(20) == 0
        assert server.stderr is not None
        assert server.stderr.read() == ""
    capsys.readouterr()
    assert cli.main([*wanted, "--force"]) == 2
    assert "no policy server answers at remote://" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_bad_input_ends_in_a_line(
    port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is not a folder" in refused(capsys, "serve", tmp_path / "nothing")
    taken = refused(capsys, "serve", BACKBONE_FOLDER, "--port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in taken
    assert "port is 70000" in refused(capsys, "serve", BACKBONE_FOLDER, "--port", 70000)
    (tmp_path / "empty").write_text("\n")
    wrong = refused(capsys, "serve", BACKBONE_FOLDER, "--token-file", tmp_path / "empty")
    assert "holds no token" in wrong
    where = ("--env", "VR-UnseenTable", "--output", tmp_path / "out")
    assert "unknown policy 'tinny'" in refused(capsys, "eval", "--policy", "tinny", *where)
    both = refused(capsys, "eval", tmp_path, "--policy", f"remote://127.0.0.1:{port}", *where)
    assert "would not be used" in both


def test_a_token_that_is_none_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in (tmp_path / "pipe", "/dev/zero", tmp_path):
        said = refused(capsys, "serve", BACKBONE_FOLDER, "--token-file", name)
        assert "cannot be read (it is not a plain file)" in said
    for content in (b"two words", b"two\nlines", b"", "é".encode(), b"a\0b", b"a\x7fb"):
        (tmp_path / "token").write_bytes(content)
        said = refused(capsys, "serve", BACKBONE_FOLDER, "--token-file", tmp_path / "token")
        assert "holds no token: expected one line of ASCII without spaces" in said
    (tmp_path / "token").write_bytes(b"x" * 5000)
    said = refused(capsys, "serve", BACKBONE_FOLDER, "--token-file", tmp_path / "token")
    assert "more than the 4,096 it may have" in said
    for value in ("two words", "é", "a\nX-Other: b", " ", "x" * 5000):
        monkeypatch.setenv("ROADVLA_TOKEN", value)
        for line in (
            ("serve", BACKBONE_FOLDER),
            ("eval", "--policy", "remote://127.0.0.1:1", "--env", "VR-UnseenTable"),
        ):
            said = refused(capsys, *line)
            assert "the variable ROADVLA_TOKEN holds no token: expected one line" in said
            assert said.count("\n") == 1


def test_a_server_that_goes_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(load_backbone("cpu")) as port:
        policy = RemotePolicy(f"remote://127.0.0.1:{port}")
    with pytest.raises(UserError, match="is gone"):
        policy.act(
            Observation(torch.from_numpy(frames(0)), policy.tokenize([PROMPT])), temperature=0.0
        )


def test_a_stranger_is_no_policy_server() -> None:
    def greet(answer: str | bytes) -> Callable[[ServerConnection], None]:
        return lambda connection: connection.send(answer)

    for answer, words in (
        ("hello", "is no policy server"),
        (pack({"protocol": 1}), "is no policy server"),
        (pack({**SOUND, "protocol": 2}), "speaks version 2 of the protocol, this is 1"),
        (pack({**SOUND, "protocol": [1]}), r"speaks version \[1\]"),
        (pack({**SOUND, "checkpoint": [1, 2]}), r"its checkpoint is \[1, 2\]: expected a text"),
        (pack({**SOUND, "checkpoint": None}), "its checkpoint is None"),
        (pack({**SOUND, "checkpoint": "x" * 5000}), "its checkpoint is 'xxx"),
        (pack({**SOUND, "policy": 3}), "its policy is 3"),
        (pack({**SOUND, "iteration": "abc"}), "its iteration is 'abc': expected a whole number"),
        (pack({**SOUND, "env_steps": -1}), "its env_steps is -1"),
        (pack({**SOUND, "iteration": True}), "its iteration is True"),
        (pack({**SOUND, "max_batch": 0}), "its max_batch is 0"),
        (pack({**SOUND, "max_batch": "5"}), "its max_batch is '5'"),
        (pack({**SOUND, "norm_stats": 3}), "its norm_stats: action statistics are unreadable"),
        (pack({**SOUND, "norm_stats": {"action": np.zeros(7)}}), "its norm_stats: action stat"),
        (pack({**SOUND, "norm_stats": stats(3)}), "its norm_stats are of 3 numbers, not 7"),
        (pack({**SOUND, "norm_stats": stats(7, 1e308)}), "actions that are no numbers"),
    ):
        with (
            standing_in(greet(answer)) as address,
            pytest.raises(UserError, match=words) as caught,
        ):
            RemotePolicy(address)
        assert len(str(caught.value)) < 300


def stats(count: int, end: float = 1.0) -> dict:
    return {"action": {"q01": [-end] * count, "q99": [end] * count, "mask": [True] * count}}


SOUND = {
    "protocol": 1,
    "policy": "tiny",
    "checkpoint": "there",
    "iteration": None,
    "env_steps": 5,
    "max_batch": 4,
    "norm_stats": stats(7),
}
ANSWER = {
    "action_tokens": np.full((1, 7), 255),
    "log_probs": np.zeros((1, 7), np.float32),
    "value": np.zeros(1, np.float32),
}


@contextmanager
def standing_in(behave: Callable[[ServerConnection], object]) -> Iterator[str]:
    """Run a server that does something else, and give its address."""
    with sync_serve(behave, "127.0.0.1", 0) as stranger:
        thread = threading.Thread(target=stranger.serve_forever)
        thread.start()
        try:
            yield f"remote://127.0.0.1:{stranger.socket.getsockname()[1]}"
        finally:
            stranger.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (ANSWER, ""),
        ({}, "its action_tokens is None: expected int64 [1, 7]"),
        ({**ANSWER, "action_tokens": "abc"}, "its action_tokens is 'abc'"),
        ({**ANSWER, "action_tokens": np.zeros((1, 3), np.int64)}, "is int64 [1, 3]: expected"),
        ({**ANSWER, "action_tokens": np.zeros((2, 7), np.int64)}, "is int64 [2, 7]: expected"),
        ({**ANSWER, "action_tokens": np.zeros((1, 7))}, "is float64 [1, 7]: expected"),
        ({**ANSWER, "action_tokens": np.full((1, 7), 100_000)}, "are not all in 0 to 255"),
        ({**ANSWER, "action_tokens": np.full((1, 7), 256)}, "are not all in 0 to 255"),
        ({**ANSWER, "action_tokens": np.full((1, 7), -1)}, "are not all in 0 to 255"),
        ({**ANSWER, "log_probs": np.full((1, 7), np.nan, np.float32)}, "its log_probs are not all"),
        ({**ANSWER, "log_probs": np.zeros(7, np.float32)}, "its log_probs is float32 [7]"),
        ({**ANSWER, "value": np.zeros((1, 1), np.float32)}, "its value is float32 [1, 1]"),
        ({**ANSWER, "value": np.full(1, np.inf, np.float32)}, "its value are not all finite"),
        (b"\xc1", "the message is not readable"),
        (b"\x90", "the message is a list"),
        ("no\n" * 5000, "says: no no"),
    ],
)
def test_an_answer_that_is_none_is_told(answer: dict | bytes | str, words: str) -> None:
    def behave(connection: ServerConnection) -> None:
        connection.send(pack(SOUND))
        for _ in connection:
            connection.send(pack(answer) if isinstance(answer, dict) else answer)

    with standing_in(behave) as address, closing(RemotePolicy(address)) as policy:
        assert policy.about["env_steps"] == 5
        seen = Observation(torch.from_numpy(frames(0)), policy.tokenize([PROMPT]))
        if not words:
            assert policy.act(seen, temperature=0.0).action_tokens.tolist() == [[255] * 7]
            return
        with pytest.raises(UserError) as caught:
            policy.act(seen, temperature=0.0)
    said = str(caught.value)
    assert words in said
    assert said.startswith(f"the policy server at {address} ")
    assert len(said) < 400
    assert "\n" not in said


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:99999", "127.0.0.1:-1", "[::1", "", ":80", "a b:1", "x" * 300 + ":1", "\0:1"],
)
def test_an_address_that_is_none_is_told(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "eval", "--policy", f"remote://{address}", "--env", "VR-UnseenTable")
    assert "no policy server answers at remote://" in said
    assert said.count("\n") == 1
