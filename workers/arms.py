"""A/B arms: who is in which, and by which rules its lists are made."""

from collections.abc import Mapping, Sequence
from hashlib import blake2b

from model.user_state import Entry, digest
from stream.events import DEFAULT_ARM, Click
from workers.settings import Arm, Settings
from workers.snapshot import NOBODY, PLAIN, Query, Rules

CONTROL = Arm(share=1.0)


def arm_of(settings: Settings, user_id: str) -> str:
    """The arm of a user: by a keyed hash of the id, so the same in every process; another key deals anew."""
    if not settings.arms:
        return DEFAULT_ARM
    hashed = blake2b(user_id.encode(), digest_size=8, key=settings.arms_key.encode()).digest()
    dealt = int.from_bytes(hashed, "big") / 2**64
    for name in sorted(settings.arms):
        dealt -= settings.arms[name].share
        if dealt < 0:
            return name
    return DEFAULT_ARM


def all_arms(settings: Settings) -> Mapping[str, Arm]:
    """The arms that have users, the default one among them where the shares leave room for it."""
    rest = 1.0 - sum(arm.share for arm in settings.arms.values())
    return settings.arms if rest < 1e-9 else {DEFAULT_ARM: CONTROL, **settings.arms}


def rules_of(settings: Settings, arm: str, seed: int = 0) -> Rules:
    """The rules of an arm's lists; a seed a list."""
    chosen = settings.arms.get(arm, CONTROL)
    return Rules(diversity=chosen.diversity, explore=chosen.explore, seed=seed)


def query_of(settings: Settings, click: Click, history: Sequence[Entry], seen: bytes, sent: bool) -> Query:
    """For the list before or after a click, by its user's arm. One that is delivered again draws the same list again.

    It is of the moment of the history's newest click: a list is sent before the pause after it is known.
    The list that is `sent` says of what is drawn how likely it was in the other arms, for `upwell arms report`.
    """
    now_ms = history[-1].ts_ms if history else click.ts_ms
    if not settings.arms:
        return Query(history, seen, now_ms, PLAIN)
    arm = arm_of(settings, click.user_id)
    rules = rules_of(settings, arm, int.from_bytes(digest(click.event_id), "little"))
    logged = sent and rules.explore > 0
    others = {name: rules_of(settings, name) for name in all_arms(settings) if name != arm} if logged else NOBODY
    return Query(history, seen, now_ms, rules, others)
