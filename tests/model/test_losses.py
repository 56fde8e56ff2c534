import math

import numpy as np
import torch

from model.losses import softmax_loss


def slow_loss(scores: torch.Tensor, targets: list[int], excluded: torch.Tensor, weights: list[float]) -> float:
    total = 0.0
    for line, target in enumerate(targets):
        rivals = [c for c in range(scores.shape[1]) if c == target or not excluded[line, c]]
        normaliser = sum(math.exp(scores[line, c]) for c in rivals)
        total -= weights[line] * (float(scores[line, target]) - math.log(normaliser))
    return total / sum(weights)


def test_equals_a_loop_and_the_target_always_competes() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 7, generator=generator)
    excluded = torch.rand(5, 7, generator=generator) < 0.5
    targets, weights = [0, 3, 3, 6, 2], [1.0, 2.0, 0.5, 1.0, 0.0]
    excluded[0, 0] = True
    got = softmax_loss(scores.clone(), torch.tensor(targets), excluded, torch.tensor(weights))
    assert math.isclose(float(got), slow_loss(scores, targets, excluded, weights), rel_tol=1e-5)


def test_consumed_items_get_no_gradient() -> None:
    given = torch.zeros(1, 3, requires_grad=True)
    excluded = torch.tensor([[False, True, False]])
    softmax_loss(given + 0, torch.tensor([0]), excluded, torch.ones(1)).backward()  # type: ignore[no-untyped-call]
    assert given.grad is not None
    assert given.grad[0].tolist() == [-0.5, 0.0, 0.5]


def test_a_sample_estimates_the_full_denominator_without_bias() -> None:
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.normal(size=(1, 101)).astype(np.float32))
    drawn, kept = 20, []
    expansion = torch.cat([torch.zeros(1), torch.full((drawn,), math.log(100 / drawn))])
    none = torch.zeros(1, drawn + 1, dtype=torch.bool)
    for _ in range(2000):
        columns = [0, *(1 + random.choice(100, drawn, replace=False))]
        loss = softmax_loss(scores[:, columns] + expansion, torch.tensor([0]), none, torch.ones(1))
        kept.append(math.exp(float(loss + scores[0, 0])))  # the denominator
    assert math.isclose(np.mean(kept), float(scores.exp().sum()), rel_tol=0.02)
