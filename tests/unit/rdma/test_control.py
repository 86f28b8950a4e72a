"""An initiator's control connection to a target that the test plays."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from typing import TYPE_CHECKING

import pytest
from mooncake_engine import PathUnavailable
from mooncake_engine.transport.rdma.control import Control
from mooncake_engine.transport.rdma.job import Job
from mooncake_engine.transport.rdma.keys import KeyRow
from mooncake_engine.transport.rdma.messages import (
    Accepted,
    Disconnect,
    Hello,
    Keys,
    Message,
    MessageStream,
    Proven,
    Settle,
    Settled,
    WantKeys,
    Welcome,
)
from mooncake_engine.transport.rdma.records import VERSION, RdmaEndpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT_S = 30.0


class Target:
    """Listens, and says what the test tells it to."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.record = RdmaEndpoint("127.0.0.1", self._listener.getsockname()[1], VERSION, (), {})
        self.stream: MessageStream

    def greet(self, *answers: Message) -> None:
        """Accept one connection and answer its first questions."""
        sock, _ = self._listener.accept()
        self.stream = MessageStream(sock)
        assert self.stream.receive() == Hello("it")
        for answer in answers:
            self.stream.send(answer)

    def close(self) -> None:
        self._listener.close()
        with contextlib.suppress(AttributeError):  # nobody connected
            self.stream.close()


class Connected:
    """Both ends, after their greeting, and what our end was told."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.answers: list[Message] = []
        self.gone: list[str] = []
        greeting = threading.Thread(target=target.greet, args=(Welcome("it"), Keys((), ())))
        greeting.start()
        self.control = Control(
            "the peer",
            "it",
            target.record,
            LIMIT_S,
            on_answer=self.answers.append,
            on_gone=self.gone.append,
        )
        greeting.join()
        assert target.stream.receive() == WantKeys()
        self.control.start()


@pytest.fixture
def target() -> Iterator[Target]:
    with contextlib.closing(Target()) as made:
        yield made


@pytest.fixture
def ends(target: Target) -> Iterator[Connected]:
    made = Connected(target)
    with contextlib.closing(made.control):
        yield made


def woken(job: Job) -> None:
    end = time.monotonic() + LIMIT_S
    job.wait(end)
    assert time.monotonic() < end


def test_an_answer_to_somebody_elses_question_may_be_too_old(ends: Connected) -> None:
    """The peer answers in order; what it said before we asked may be from before it changed."""
    early, late = Job(), Job()
    first = ends.control.ask_for_keys(early)
    assert ends.target.stream.receive() == WantKeys()
    second = ends.control.ask_for_keys(late)
    ends.target.stream.send(Keys((), ()))
    woken(early)
    assert first <= ends.control.keys_told < second
    assert not late.woken
    ends.target.stream.send(Keys((KeyRow(4096, 4096, ()),), ("cpu",)))
    woken(late)
    assert ends.control.keys_told == second
    assert len(ends.control.keys[0]) == 1


def test_each_answer_finds_its_question(ends: Connected) -> None:
    jobs = [Job() for _ in range(3)]
    questions = [ends.control.settle((number,), job) for number, job in enumerate(jobs)]
    asked = [ends.target.stream.receive() for _ in jobs]
    for message, error in zip(reversed(asked), ("c", "b", ""), strict=True):
        assert isinstance(message, Settle)
        ends.target.stream.send(Settled(message.token, error))
    for job in jobs:
        woken(job)
    assert [question.answer for question in questions] == ["", "b", "c"]


def test_the_end_of_the_connection_wakes_who_waits_for_an_answer_and_is_told_once(
    ends: Connected,
) -> None:
    wants_keys, settles = Job(), Job()
    ends.control.ask_for_keys(wants_keys)
    question = ends.control.settle((0,), settles)
    ends.target.stream.shutdown()
    woken(wants_keys)
    woken(settles)
    assert question.answer is None
    assert "closed its control connection" in ends.control.gone
    for _ in range(20):  # until the peer's end refuses it: the first ones may still be taken
        ends.control.send(Disconnect(1))
    assert ends.gone == [ends.control.gone]


def test_what_concerns_endpoints_is_handed_on_and_nonsense_ends_it(ends: Connected) -> None:
    ends.target.stream.send(Proven(5, 1))
    ends.target.stream.send(Accepted(5, (), 4096, 1))
    job = Job()
    ends.control.ask_for_keys(job)
    ends.target.stream.send(Disconnect(5))
    woken(job)
    assert ends.answers == [Proven(5, 1), Accepted(5, (), 4096, 1)]
    assert "which initiators do not take" in ends.control.gone


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ((Welcome("it", "it was restarted"),), "refuses: it was restarted"),
        ((Keys((), ()),), "it did not greet"),
        ((Welcome("it"), Welcome("it")), "did not tell its keys"),
        ((Welcome("it"), Keys((), ("cpu",))), "1 locations for 0 keys"),
        ((Welcome("it"), Keys((KeyRow(0, 8, (1,)),), ("cpu",))), "keys cannot be used"),
        ((), "no greeting"),
    ],
    ids=["restarted", "no greeting", "no keys", "locations", "devices", "silence"],
)
def test_a_peer_that_does_not_greet_as_it_should_is_not_connected_to(
    target: Target, answers: tuple[Message, ...], why: str
) -> None:
    greeting = threading.Thread(target=target.greet, args=answers)
    greeting.start()
    with pytest.raises(PathUnavailable, match=why):
        Control(
            "the peer",
            "it",
            target.record,
            LIMIT_S if answers else 0.2,
            on_answer=lambda _answer: None,
            on_gone=lambda _why: None,
        )
    greeting.join()
