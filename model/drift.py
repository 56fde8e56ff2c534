"""How far what users click on has moved."""

import numpy as np
from numpy.typing import NDArray


def drift(before: NDArray[np.floating], after: NDArray[np.floating]) -> float:
    """How far the mean of the later vectors lies from that of the earlier ones, in standard deviations.

    before (N, D), after (M, D). The squared distance is the unbiased MMD with a linear kernel (Gretton et al., 2012,
    lemma 6): it does not grow because a sample is small, and is cut at 0. NaN where either has fewer than 2 rows.
    """
    if min(len(before), len(after)) < 2:
        return float("nan")
    spreads = [float(part.var(axis=0, ddof=1).sum()) for part in (before, after)]
    squared = float(((before.mean(axis=0) - after.mean(axis=0)) ** 2).sum())
    squared -= spreads[0] / len(before) + spreads[1] / len(after)
    within = (spreads[0] + spreads[1]) / 2
    return float(np.sqrt(max(0.0, squared) / within)) if within > 0 else float("nan")
