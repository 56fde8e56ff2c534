"""Learner and model stay on the device they are given, seen without one: "cuda" is main memory that is kept apart.

What a made-up device cannot show: that a kernel is there, and is right. No test has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from model.gate import hold_out, judge
from model.learner import Learner
from model.model import Model
from model.sampling import History
from tests.model.test_learner import CONFIG, HISTORY, ITEMS, TEXT, chain

GPU = torch.device("cuda")
INDEXING = ("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")  # rows may lie in main memory
THERE = set[Any]()  # what lies on the made-up device
storage: Any = StorageWeakRef


def there(value: Any) -> bool:
    return isinstance(value, Tensor) and storage(value.untyped_storage()) in THERE


def taken(made: Any) -> Any:
    THERE.update(storage(one.untyped_storage()) for one in tree_leaves(made) if isinstance(one, Tensor))
    return made


def is_gpu(argument: Any) -> bool:
    return isinstance(argument, str | torch.device) and str(argument) == "cuda"


class Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """No kernel, of a backward pass neither, is given tensors of both sides; what it makes lies where they do."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = str(func), [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
        made = func(*args, **(kwargs or {}))
        if name.startswith("aten.copy_") or not any(map(there, given)):
            return made
        if name.startswith(INDEXING) and there(args[0]):
            given = [args[0], *args[2:3]]
        stray = [tuple(one.shape) for one in given if one.dim() and not there(one)]  # a number may come along
        assert not stray, f"{name} on the device is given {stray} from main memory"
        return taken(made)


class Calls(TorchFunctionMode):
    """`device=` and `.to` lead there, `.cpu` back, `.device` says so; numpy cannot read what is there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        first: Any = next(iter(args), None)
        if there(first):
            assert name not in ("numpy", "__array__"), f"{name} of a tensor on the device"
            if name == "cpu":
                return torch.empty(first.shape, dtype=first.dtype).copy_(first.detach())
            if name == "__get__" and func.__self__ is Tensor.device:
                return GPU
        if name == "_parse_to" or not any(map(is_gpu, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        args, kwargs = tree_map(lambda leaf: "cpu" if is_gpu(leaf) else leaf, (args, kwargs))
        return taken(func(*args, **kwargs | ({"copy": True} if name == "to" else {})))


class Generator(torch.Generator):
    def __new__(cls, device: str = "cpu") -> Generator:
        return super().__new__(cls)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(torch, "Generator", Generator)
    with Kernels(), Calls():  # type: ignore[no-untyped-call]
        yield "cuda"
    THERE.clear()


def test_the_made_up_device_is_no_main_memory(device: str) -> None:
    far, here = torch.ones(3, device=device), torch.ones(3)
    assert far.device == (far[:1].double() + 1).device == GPU and far.cpu().device == here.device
    with pytest.raises(AssertionError, match=r"aten.add.Tensor on the device is given \[\(3,\)\] from main memory"):
        far + here
    with pytest.raises(AssertionError, match="numpy of a tensor on the device"):
        far.numpy()
    np.testing.assert_array_equal((far + here.to(device) + here.sum()).cpu().numpy(), [5, 5, 5])


@pytest.mark.parametrize("same_stamp", [True, False])
def test_learning_judging_and_serving_stay_on_the_device(device: str, tmp_path: Path, same_stamp: bool) -> None:
    config = replace(CONFIG, same_stamp_history=same_stamp, warmup_steps=4, full_softmax_items=10, sampled_items=15)
    learner, events = Learner(config, device=device), chain(256, 0.2)
    learner.model().user_vectors([History.of()], [9])  # without items
    events.weights[::5] = -1
    learner.learn(events.slice(0, 64))
    learner.add_items(ITEMS, TEXT)
    learner.add_items([f"other {row}" for row in range(40)], -TEXT)  # enough for directions of their own
    learner.learn(events.slice(64, 128))
    model = learner.model()
    assert model.device == GPU
    model.save(tmp_path)
    held_out = hold_out(learner, events.slice(128, 256))
    resumed = Learner(config, device=device)
    resumed.resume(Model.load(tmp_path), learner.text())
    resumed.absorb(events.slice(0, 128))
    resumed.learn(events.slice(128, 256))
    served, here = Model.load(tmp_path, device), Model.load(tmp_path)
    assert "compared" not in judge(resumed.model(), served, held_out, learner.text()).reason
    asked = [HISTORY, History.of()], [9, 9]
    np.testing.assert_allclose(served.user_vectors(*asked), here.user_vectors(*asked), rtol=1e-4, atol=2e-5)
    grown, row = served.extended(["new"], TEXT[:1]).only(["new", *ITEMS]), np.array([40])
    np.testing.assert_allclose(
        grown.item_vectors(row), here.extended(["new"], TEXT[:1]).item_vectors(row + 40), atol=1e-5
    )
    np.testing.assert_array_equal(grown.tastes(row), grown.served["tower.items"][row])
    np.testing.assert_allclose(grown.text_query(TEXT[0]), here.text_query(TEXT[0]), rtol=1e-4, atol=1e-5)


def test_a_gpu_without_room_is_no_damaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError is: the worker would refuse the generation for good, the gate would pass over what serves."""

    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("no room")

    Learner(CONFIG).model().save(tmp_path)
    monkeypatch.setattr(Tensor, "to", full)
    with pytest.raises(torch.OutOfMemoryError):
        Model.load(tmp_path, "cuda")
