"""What may be in a message, and what ends as one line to its sender."""

from __future__ import annotations

import contextlib
import time
import tracemalloc

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from roadvla.serving.counting import MAX_VALUES, count_values
from roadvla.serving.messages import MessageError, pack, read_request, unpack

FRAME = np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)
LIMITS = {"tokens": 7, "rows": 4, "temperature": 0.5}


def test_arrays_travel_as_openpi_s_clients_write_them() -> None:
    written = msgpack.unpackb(pack({"image": FRAME, "n": np.float32(0.5)}))
    assert written["n"] == 0.5
    assert written["image"] == {
        b"__ndarray__": True,
        b"data": FRAME.tobytes(),
        b"dtype": "|u1",
        b"shape": [48, 48, 3],
    }


@pytest.mark.parametrize("kind", ["u1", "f4", "f8", "i4", "i8", "?"])
def test_arrays_arrive_as_they_were_sent(kind: str) -> None:
    sent = np.ones((2, 0, 3), kind), np.arange(6).astype(kind).reshape(1, 2, 3)
    got = unpack(pack({"a": {"b": list(sent)}}))["a"]["b"]
    for before, after in zip(sent, got, strict=True):
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(before, after)


def test_one_frame_and_several() -> None:
    one = read_request({"observation/image": FRAME, "prompt": "put"}, **LIMITS)
    assert (one.single, one.image.shape, one.prompts) == (True, (1, 48, 48, 3), ("put",))
    assert (one.temperature, one.uniform) == (0.5, None)
    two = {"image": np.stack([FRAME] * 2), "instruction": ["a", "b"], "temperature": 0, "seed": 3}
    several = read_request(two, **LIMITS)
    assert (several.single, several.prompts, several.temperature) == (False, ("a", "b"), 0.0)
    assert several.uniform is not None
    again = read_request(two, **LIMITS).uniform
    assert again is not None
    np.testing.assert_array_equal(several.uniform, again)


GOOD = {"image": FRAME, "prompt": "put"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image": None}, "NoneType 'None' stands for the image"),
        ({"image": FRAME.astype(np.float32)}, "float32 [48, 48, 3] stands for the image"),
        ({"image": FRAME[0]}, "stands for the image"),
        ({"image": FRAME[..., :1]}, "expected [H, W, 3]"),
        ({"image": np.zeros((1, 4000, 3), np.uint8)}, "up to 2048"),
        ({"image": np.zeros((0, 48, 48, 3), np.uint8), "prompt": []}, "0 frames at once"),
        (
            {"image": np.stack([FRAME] * 5), "prompt": ["x"] * 5},
            "5 frames at once",
        ),
        ({"prompt": 3}, "expected 1 texts"),
        ({"prompt": ["a", "b"]}, "expected 1 texts"),
        ({"prompt": "x" * 1001}, "longer than 1000"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1}, "temperature is -1"),
        ({"temperature": 101}, "temperature is 101.0: expected 0 (greedy) or 0.001 to 100"),
        ({"temperature": 1e-40}, "temperature is 1e-40: expected 0 (greedy) or 0.001 to 100"),
        ({"temperature": 2**63}, "temperature is 9.2"),
        ({"temperature": True}, "expected a number"),
        ({"seed": -1}, "seed is"),
        ({"seed": 1.5}, "seed is"),
        ({"uniform": np.zeros((1, 6), np.float32)}, "expected float32 [1, 7]"),
        ({"uniform": np.ones((1, 7), np.float32)}, "outside [0, 1)"),
        ({"uniform": np.full((1, 7), np.nan, np.float32)}, "outside [0, 1)"),
        ({"uniform": "x"}, "uniform is str"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(MessageError) as caught:
        read_request({**GOOD, **changes}, **LIMITS)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_missing_key_is_named() -> None:
    with pytest.raises(MessageError, match=r"'observation/image' is missing: the message has"):
        read_request({"prompt": "put", 3: 4}, **LIMITS)
    with pytest.raises(MessageError) as caught:
        read_request({f"{i}" * 1000: 4 for i in range(20)}, **LIMITS)
    assert len(str(caught.value)) < 400


def array(**changes: object) -> bytes:
    sound = {b"__ndarray__": True, b"data": b"\0" * 12, b"dtype": "|u1", b"shape": [2, 2, 3]}
    sound |= {name.encode(): value for name, value in changes.items()}
    return msgpack.packb({"image": sound})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xff",
        b"hello",
        msgpack.packb([1, 2]),
        msgpack.packb("text"),
        msgpack.packb(7),
        msgpack.packb(msgpack.ExtType(1, b"x")),
        b"\x81" * 2000,
        b"\x91" * 100_000,
        array(dtype="|O"),
        array(dtype="<c8"),
        array(dtype="V3"),
        array(dtype=b"\xff"),
        array(dtype=3),
        array(shape=[2, 2, 4]),
        array(shape=[-2, -2, 3]),
        array(shape=[True, 4, 3]),
        array(shape=[2**40, 2**40]),
        array(shape=[1] * 9 + [12]),
        array(shape="x"),
        array(data="text"),
        array(data=None),
        pack(GOOD)[:-20],
        pack(GOOD) + b"\0",
        b"\xdd\xff\xff\xff\xff" + b"\0" * 10,  # a list that says it has 2³² − 1 entries
        b"\x81\xa1a\xc6\xff\xff\xff\xff",  # bytes that say they are 4 GiB
    ],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(MessageError):
        unpack(data)


def listed(count: int, of: bytes) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + of * count


@pytest.mark.parametrize(
    "data",
    [
        b"\x81\xa1a" + listed(79, of=listed(99_999, of=b"\x90")),
        b"\x81\xa1a" + listed(900, of=listed(9_000, of=b"\x80")),  # each list within its bound
        b"\x81\xa1a" + listed(7_900_000, of=b"\xc0"),
        b"\x81\xa1a" + b"\xdc\x00\x02" * 10_000,
        b"\x81\xa1a" + b"\xdf\xff\xff\xff\xff" + b"\xa1b\xc0" * 10_000,
        b"\x8f" * 1_000_000,
    ],
)
def test_a_small_message_that_would_become_large_costs_nothing(data: bytes) -> None:
    tracemalloc.start()
    begun = time.process_time()
    with pytest.raises(MessageError, match="more than 10,000 values"):
        unpack(data)
    took, peak = time.process_time() - begun, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert took < 0.5  # a few milliseconds; traced, and on a busy machine


def test_a_large_request_is_far_from_the_bound() -> None:
    message = {"image": np.zeros((1000, 48, 48, 3), np.uint8), "prompt": ["put"] * 1000}
    assert count_values(pack(message)) < MAX_VALUES / 5
    assert unpack(pack({"a": [None] * (MAX_VALUES - 3)}))
    with pytest.raises(MessageError, match="values"):
        unpack(pack({"a": [None] * (MAX_VALUES - 2)}))


ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text()
    | st.binary(max_size=300),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(), inner, max_size=20),
    max_leaves=60,
)  # fmt: skip


def counted(value: object) -> int:
    if isinstance(value, dict):
        return 1 + sum(1 + counted(inner) for inner in value.values())
    return 1 + (sum(map(counted, value)) if isinstance(value, list) else 0)


@given(ANY)
def test_every_value_is_counted_once(value: object) -> None:
    assert count_values(msgpack.packb(value)) == counted(value)
    assert count_values(msgpack.packb([value] * 20)) == 1 + 20 * counted(value)


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    try:
        message = unpack(data)
    except MessageError:
        return
    with contextlib.suppress(MessageError):
        read_request(message, **LIMITS)


@given(st.integers(0, 7200), st.integers(0, 255))
def test_no_changed_byte_breaks_the_reader(place: int, value: int) -> None:
    data = bytearray(pack(GOOD))
    data[place % len(data)] = value
    try:
        request = read_request(unpack(bytes(data)), **LIMITS)
    except MessageError:
        return
    assert request.image.shape[0] == len(request.prompts)
