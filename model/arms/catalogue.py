"""Every arm by name, made for a stream."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from model.arms.counts import CovisitationArm, PopularityArm, markov_arm
from model.arms.factors import BprArm, IsgdArm
from model.arms.neighbours import UserKnnArm
from model.arms.neural import RetrainedArm
from model.arms.text import TextArm
from model.arms.variants import NEVER, Delayed, Without
from model.config import ModelConfig
from model.evaluate import Arm, LearnerArm, Mode
from model.learner import Learner

PRODUCT = "upwell"
PERIODS = {"minute": 60_000, "hour": 3_600_000, "day": 86_400_000, "never": NEVER}
_SAMPLED = re.compile(r"upwell-sampled-([1-9]\d*)")
_DELAYED = re.compile(r"upwell(?:-state-(minute|hour|day))?(?:-weights-(hour|day|never))?")


@dataclass(frozen=True)
class Setting:
    """What an arm may know before the stream begins."""

    items: list[str]  # (N,) the catalogue
    text: NDArray[np.float32]  # (N, E)
    mode: Mode
    events: int  # n, of which the first `warmup` are not counted
    warmup: int
    seed: int = 0

    def config(self) -> ModelConfig:
        """The one default; in strict mode events of one stamp must not see each other in training either."""
        return ModelConfig(text_dim=self.text.shape[1], same_stamp_history=self.mode == "line")


def _learner_arm(learner: Learner, setting: Setting, text: NDArray[np.float32]) -> LearnerArm:
    learner.add_items(setting.items, text)
    return LearnerArm(learner)


def _upwell(setting: Setting) -> LearnerArm:
    return _learner_arm(Learner(setting.config(), setting.seed), setting, setting.text)


def _without(part: str) -> Callable[[Setting], Arm]:
    return lambda setting: _learner_arm(Without(part, setting.config(), setting.seed), setting, setting.text)


def _retrained(kind: str) -> Callable[[Setting], Arm]:
    return lambda s: RetrainedArm(kind, len(s.items), max(1, s.events // 20), s.mode == "line", seed=s.seed)


ARMS: dict[str, Callable[[Setting], Arm]] = {
    "popularity": lambda s: PopularityArm(len(s.items)),
    "popularity-decayed": lambda s: PopularityArm(len(s.items), 10_000.0),
    "popularity-recent": lambda s: PopularityArm(len(s.items), 1_000.0),
    "popularity-now": lambda s: PopularityArm(len(s.items), 125.0),
    "markov": lambda s: markov_arm(len(s.items)),
    "covisitation": lambda s: CovisitationArm(len(s.items)),
    "user-knn": lambda s: UserKnnArm(len(s.items)),
    "isgd": lambda s: IsgdArm(len(s.items), seed=s.seed),
    "bpr": lambda s: BprArm(len(s.items), seed=s.seed),
    "text": lambda s: TextArm(s.text),
    "gru4rec": _retrained("gru4rec"),
    "sasrec": _retrained("sasrec"),
    PRODUCT: _upwell,
    "upwell-without-text": lambda s: _learner_arm(Learner(s.config(), s.seed), s, np.zeros_like(s.text)),
    "upwell-without-tower": _without("tower"),
    "upwell-without-covisitation": _without("covisitation"),
}
CHEAP = (
    "popularity", "popularity-decayed", "popularity-recent", "popularity-now", "markov", "covisitation", "user-knn",
    "isgd", "bpr", "text", PRODUCT,
)  # fmt: skip


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that make_arm does not know."""
    for name in names:
        if name not in ARMS and not _DELAYED.fullmatch(name) and not _SAMPLED.fullmatch(name):
            known = f"{', '.join(ARMS)}, upwell-state-PERIOD-weights-PERIOD or upwell-sampled-ITEMS"
            raise ValueError(f"no arm {name!r}: one of {known}")


def make_arm(name: str, setting: Setting) -> Arm:
    """An arm of ARMS, or upwell[-state-minute|hour|day][-weights-hour|day|never]: told things late, or
    upwell-sampled-N: learns against N sampled items however few there are.

    Raises ValueError for another name.
    """
    check_names([name])
    if name in ARMS:
        return ARMS[name](setting)
    if sampled := _SAMPLED.fullmatch(name):
        config = replace(setting.config(), full_softmax_items=0, sampled_items=int(sampled[1]))
        return _learner_arm(Learner(config, setting.seed), setting, setting.text)
    found = _DELAYED.fullmatch(name)
    assert found
    state, weights = (PERIODS[period] if period else 0 for period in found.groups())
    return Delayed(_upwell(setting), state, weights, setting.warmup)
