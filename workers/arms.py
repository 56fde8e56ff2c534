"""A/B arms: who is in which, and by which rules its lists are made."""

from collections.abc import Mapping
from hashlib import blake2b

from stream.events import DEFAULT_ARM
from workers.settings import Arm, Settings
from workers.snapshot import Rules

CONTROL = Arm(share=1.0)


def arm_of(settings: Settings, user_id: str) -> str:
    """The arm of a user: by a keyed hash of the id, so the same in every process; another key deals anew."""
    digest = blake2b(user_id.encode(), digest_size=8, key=settings.arms_key.encode()).digest()
    dealt = int.from_bytes(digest, "big") / 2**64
    for name in sorted(settings.arms):
        dealt -= settings.arms[name].share
        if dealt < 0:
            return name
    return DEFAULT_ARM


def all_arms(settings: Settings) -> Mapping[str, Arm]:
    """The arms that have users, the default one among them where the shares leave room for it."""
    rest = 1.0 - sum(arm.share for arm in settings.arms.values())
    return settings.arms if rest < 1e-9 else {DEFAULT_ARM: CONTROL, **settings.arms}


def rules_of(settings: Settings, arm: str, seed: int) -> Rules:
    """The rules of an arm's list; a seed a list."""
    chosen = settings.arms.get(arm, CONTROL)
    return Rules(diversity=chosen.diversity, explore=chosen.explore, seed=seed)
