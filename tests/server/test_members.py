"""Who is in the run: generations, leases, and what is forgotten."""

from __future__ import annotations

import pytest

from diloco_proto.errors import NotMember, Superseded
from diloco_server.members import KEPT_GONE, Members, MemberState


def test_the_same_process_takes_its_membership_up_again() -> None:
    members = Members(15.0)
    member = members.hello("a", 7, 0.0)
    assert member.state is MemberState.JOINING
    member.state = MemberState.READY
    assert members.hello("a", 7, 5.0) is member
    assert member.state is MemberState.READY
    assert member.seen == 5.0


def test_a_newer_process_supersedes_the_older() -> None:
    members = Members(15.0)
    old = members.hello("a", 7, 0.0)
    old.state, old.counted, old.not_counted = MemberState.READY, 3, 2
    new = members.hello("a", 8, 1.0)
    assert new is not old
    assert new.state is MemberState.JOINING
    assert (new.counted, new.not_counted) == (3, 2)
    assert members.get("a", 8) is new
    with pytest.raises(Superseded, match="'a'"):
        members.get("a", 7)
    with pytest.raises(Superseded, match="stop this one, or give it another worker_id"):
        members.hello("a", 7, 2.0)
    assert members.live() == [new]


def test_a_worker_that_is_gone_must_say_hello_again() -> None:
    members = Members(15.0)
    members.hello("a", 7, 0.0).state = MemberState.GONE
    for worker in ("a", "nobody"):
        with pytest.raises(NotMember, match="say hello again"):
            members.get(worker, 7)
    assert members.live() == []
    assert members.hello("a", 7, 1.0).state is MemberState.JOINING


def test_leases() -> None:
    members = Members(15.0)
    assert members.next_expiry() is None
    a, b = members.hello("a", 1, 0.0), members.hello("b", 1, 10.0)
    assert members.next_expiry() == 15.0
    assert members.expired(14.9) == []
    assert members.expired(15.0) == [a]
    a.state = MemberState.GONE
    assert members.expired(24.9) == []
    assert members.next_expiry() == 25.0
    assert members.expired(25.0) == [b]


@pytest.mark.parametrize("state", [s for s in MemberState if s is not MemberState.GONE])
def test_whoever_is_live_has_a_lease(state: MemberState) -> None:
    members = Members(15.0)
    member = members.hello("a", 1, 0.0)
    member.state = state
    assert members.expired(15.0) == [member]
    assert members.in_state(state) == [member]


def test_workers_that_are_gone_are_forgotten_in_the_end() -> None:
    members = Members(15.0)
    stays = members.hello("stays", 1, 0.0)
    for number in range(3 * KEPT_GONE):
        members.hello(f"spot-{number}", 1, float(number)).state = MemberState.GONE
    assert len(members.all()) <= KEPT_GONE + 2
    assert members.known("stays") is stays
    assert members.known("spot-0") is None
    assert members.known(f"spot-{3 * KEPT_GONE - 1}") is not None


def test_a_standstill_of_the_server_is_excused_up_to_now_and_no_further() -> None:
    members = Members(15.0)
    silent, heard = members.hello("a", 1, 0.0), members.hello("b", 1, 0.0)
    heard.seen = 19.0  # its message was the first that the server read when it went on
    members.excuse(12.0, 20.0)
    assert (silent.seen, silent.moved) == (12.0, 12.0)
    assert heard.seen == 20.0
    silent.cut_at = 15.0
    members.excuse(12.0, 20.0)
    assert silent.cut_at == 20.0
