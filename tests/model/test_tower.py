import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from model.config import ModelConfig
from model.sampling import Padded
from model.tower import IdTable, TowerTrainer, UserTower, gap_bucket, item_vectors

T, D = 6, 8


@pytest.fixture
def tower() -> UserTower:
    torch.manual_seed(0)
    tower = UserTower(D, heads=2, hidden=16)
    torch.nn.init.normal_(tower.elapsed)  # zero at the start would hide mistakes in it
    return tower.requires_grad_(False)


def history(lines: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    items = F.normalize(torch.randn(lines, T, D, generator=generator), dim=2)
    weights = torch.rand(lines, T, generator=generator) + 0.5
    ts = torch.cumsum(torch.randint(0, 90_000, (lines, T), generator=generator), dim=1)
    return items, weights, torch.ones(lines, T, dtype=torch.bool), ts


def at(value: torch.Tensor) -> torch.Tensor:
    return value[:, None]


def test_a_prediction_sees_its_prefix_and_nothing_else(tower: UserTower) -> None:
    items, weights, valid, ts = history()
    now = ts + 1000
    prefix = torch.arange(1, T + 1).expand(3, -1)
    together = tower(items, weights, valid, ts, prefix, now)  # (3, T, D)
    for n in range(1, T + 1):
        cut = (items[:, :n], weights[:, :n], valid[:, :n], ts[:, :n])
        alone = tower(*cut, torch.full((3, 1), n), at(now[:, n - 1]))
        torch.testing.assert_close(together[:, n - 1 : n], alone, rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_changes_nothing(tower: UserTower) -> None:
    items, weights, valid, ts = history()
    now = at(ts[:, -1] + 5000)
    plain = tower(items, weights, valid, ts, torch.full((3, 1), T), now)
    padded = tower(
        F.pad(items, (0, 0, 4, 0), value=9.0),
        F.pad(weights, (4, 0), value=3.0),
        F.pad(valid, (4, 0), value=False),
        F.pad(ts, (4, 0)),
        torch.full((3, 1), T + 4),
        now,
    )
    torch.testing.assert_close(plain, padded, rtol=1e-4, atol=1e-5)


def test_chosen_predictions_are_those_of_all_and_teach_the_same(tower: UserTower) -> None:
    items, weights, valid, ts = history()
    tower.requires_grad_(True)
    asked = (weights, valid, ts, torch.arange(1, T + 1).expand(3, -1), ts + 1000)
    chosen = torch.rand(3, T, generator=torch.Generator().manual_seed(2)) < 0.4
    found, taught = [], []
    for all_ in (True, False):
        leaf = items.clone().requires_grad_()
        found.append(tower(leaf, *asked)[chosen] if all_ else tower(leaf, *asked, chosen))
        loss = (found[-1] * torch.arange(1.0, D + 1)).sum()
        gradients = torch.autograd.grad(loss, [leaf, *tower.parameters()], allow_unused=True)
        taught.append([g for g in gradients if g is not None])
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(taught[0], taught[1], rtol=1e-4, atol=1e-5)


def test_no_history_gives_every_stranger_the_same_unit_vector(tower: UserTower) -> None:
    items, weights, valid, ts = history()
    stranger = tower(items, weights, ~valid, ts, torch.full((3, 1), T), torch.tensor([[0], [5], [10**12]]))
    torch.testing.assert_close(stranger, stranger[:1].expand(3, -1, -1))
    torch.testing.assert_close(stranger.norm(dim=2), torch.ones(3, 1))


def test_a_dislike_is_passed_over(tower: UserTower) -> None:
    items, weights, valid, ts = history()
    asked = (torch.full((3, 1), T), at(ts[:, -1] + 5000))
    valid[:, [2, T - 1]] = False
    without = tower(items, weights, valid, ts, *asked)
    weights[:, [2, T - 1]] = -1.5
    torch.testing.assert_close(tower(items, weights, torch.ones_like(valid), ts, *asked), without)
    cut = (items[:, : T - 1], weights[:, : T - 1], valid[:, : T - 1], ts[:, : T - 1])
    assert not torch.allclose(without, tower(*cut, *(torch.full((3, 1), T - 1), at(ts[:, T - 2]))))  # the pause counts


def test_gap_bucket_doubles() -> None:
    spans = torch.tensor([-5, 0, 999, 1000, 3000, 7000, 10**15])
    assert gap_bucket(spans).tolist() == [0, 0, 0, 1, 2, 3, 19]


def test_an_untouched_item_is_its_text_and_a_textless_one_its_id() -> None:
    text, ids = torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0]] * 3)
    vectors = item_vectors(text, ids, torch.tensor([0.0, 5.0, 0.0]), scale=0.3, prior=3.0)
    assert vectors.tolist() == [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]


def test_id_table_matches_torch_adam_where_every_row_is_touched() -> None:
    table = IdTable(3, torch.Generator().manual_seed(0), "cpu")
    table.grow(5)
    reference = table.values.clone().requires_grad_()
    adam = torch.optim.Adam([reference], lr=0.01, betas=(0.9, 0.98))
    for _ in range(20):
        reference.grad = torch.randn(5, 4)
        table.step(torch.arange(5), reference.grad, 0.01)
        adam.step()
    torch.testing.assert_close(table.values, reference.detach())


def test_id_table_leaves_other_rows_alone() -> None:
    table = IdTable(3, torch.Generator().manual_seed(0), "cpu")
    table.grow(4)
    before = table.values.clone()
    table.step(torch.tensor([1, 3]), torch.ones(2, 4), 0.01)
    assert (table.values != before).any(dim=1).tolist() == [False, True, False, True]


def one_window(weight: float) -> Padded:
    rows = np.array([[-1, 0, 1]])
    weights, goals = np.full((1, 3), weight, np.float32), np.array([[0, 1, 1]], np.float32)
    return Padded(rows, weights, np.array([[0, 0, 0]]), goals)


@pytest.mark.parametrize(("same_stamp", "moves"), [(True, True), (False, False)])
def test_a_basket_is_hidden_from_itself_only_when_asked(same_stamp: bool, moves: bool) -> None:
    config = ModelConfig(text_dim=4, tower_dim=4, same_stamp_history=same_stamp, dropout=0.0)
    trainer = TowerTrainer(config, 0, "cpu")
    second = torch.tensor([[False, True]])
    first = [trainer._drawn_users(one_window(1.0), torch.full((1, 2, 4), value), 1, second) for value in (0.0, 0.5)]
    assert bool((first[0] != first[1]).any()) == moves


def test_a_step_that_is_not_finite_raises_before_any_weight_moves() -> None:
    trainer = TowerTrainer(ModelConfig(text_dim=4, tower_dim=4), 0, "cpu")
    trainer.table.grow(2)
    before = {name: value.clone() for name, value in trainer.user.state_dict().items()}
    candidates = (torch.arange(2), torch.zeros(2, 4), torch.ones(2))
    excluded, columns = np.zeros((1, 2), np.bool_), np.array([[0, 0, 1]])
    with pytest.raises(FloatingPointError, match="tower step 1"):
        trainer.step(one_window(float("nan")), columns, candidates, excluded, torch.zeros(2), 1e-3)
    assert all(bool((value == before[name]).all()) for name, value in trainer.user.state_dict().items())
