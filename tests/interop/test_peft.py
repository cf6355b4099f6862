"""Every row of the table: fastlora and stock peft from the same weights, side by side.

Names, numbers and first values of what trains; outputs and gradients, measured against the same model in fp64; dropout by the
masks that fastlora drew; both files, field by field and tensor by tensor; and each library's reading of the other's.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fastlora
from fastlora.methods.matching import is_transformers_model
from fastlora.testing.compare import assert_accurate, relative_error
from tests.interop import masks
from tests.interop.table import (
    MODELS,
    TABLE,
    TWINS,
    UNREADABLE,
    Row,
    build_base,
    common_name,
    embeddings_of,
    fields,
    fields_of_file,
    same_start,
    tensors_of_file,
)
from tests.tiny_zoo import inputs, tensors

pytestmark = pytest.mark.filterwarnings("ignore")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PADDINGS = (None, "right", "left")


def build(library: Any, row: Row) -> Any:
    base = build_base(row.model).to(row.dtype)
    config = getattr(library, row.method)(**row.settings)
    torch.manual_seed(11)
    return library.get_peft_model(base, config, autocast_adapter_dtype=row.wide).eval()


def trained(model: Any) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """What trains by name; and what in PEFT is the same memory as some of that, by the name of its twin."""
    found = {common_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not getattr(model.active_peft_config, "ensure_weight_tying", False):
        return found, {}
    return found, {
        twin: found.pop(name) for name, twin in TWINS.items() if name in found and twin in found
    }


def move(theirs: Any, ours: Any) -> None:
    """Every trained tensor away from where it began, so that nothing is zero; then both have the same values everywhere.

    What is frozen is the same already, up to the rounding of initialisations that split the base's weight.
    """
    generator = torch.Generator().manual_seed(3)
    mine = {common_name(name): p for name, p in ours.named_parameters()}
    skipped = {id(p) for p in trained(theirs)[1].values()}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if id(p) in skipped:
                continue
            own = mine.get(common_name(name))
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.1)
            elif own is not None:
                torch.testing.assert_close(own, p, rtol=1e-5, atol=1e-6)
            if own is not None:
                own.copy_(p)


def outputs(model: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    found = (
        model(**given)
        if is_transformers_model(model.get_base_model())
        else model(given["input_ids"])
    )
    return {"logits": found} if isinstance(found, Tensor) else tensors(found)


def results(model: Any, given: dict[str, Tensor], embeddings: list[str]) -> dict[str, Tensor]:
    """A step's outputs, and the gradients of what trains and of what the input embeddings gave."""
    embedded: list[Tensor] = []

    def keep(module: nn.Module, args: Any, y: Tensor) -> None:
        y.requires_grad_().retain_grad()
        embedded.append(y)

    tables = [model.get_base_model().get_submodule(name) for name in embeddings]
    handles = [table.register_forward_hook(keep) for table in tables]
    model.zero_grad()
    found = outputs(model, given)
    for handle in handles:
        handle.remove()
    loss = found.get("loss", next(iter(found.values())).float().square().mean())
    loss.backward()
    assert embedded
    parameters, twins = trained(model)
    for name, twin in twins.items():
        parameters[name].grad += twin.grad.t()
    gradients = {f"the gradient of {name}": p.grad for name, p in parameters.items()}
    gradients |= {f"the gradient of input {i}": y.grad for i, y in enumerate(embedded)}
    assert all(gradient is not None for gradient in gradients.values())
    return {**{name: y.detach() for name, y in found.items()}, **gradients}


def assert_all_accurate(got: Any, same_dtype: Any, truth: Any) -> None:
    """The accuracy rule for each tensor of a step.

    Roundings add up over a whole model, and are small by luck in some tensors of some library: peft's median error is taken as
    the noise of any, relative to its elements, and of a gradient to a tenth of the largest as well: some are sums of larger
    numbers that cancel.
    """
    assert got.keys() == same_dtype.keys() == truth.keys()
    usual = median(relative_error(same_dtype[name], value) for name, value in truth.items())
    usual = max(usual, 2**-50)  # peft in fp64 is the truth itself
    sizes = {name: value.double().square().mean().sqrt() for name, value in truth.items()}
    gradients = [size for name, size in sizes.items() if "gradient" in name]
    least = max(gradients, default=torch.zeros(())) / 10
    for name, value in truth.items():
        assert got[name].dtype == same_dtype[name].dtype, name
        size = torch.maximum(sizes[name], least) if "gradient" in name else sizes[name]
        noise = torch.maximum(value.double().abs(), size) * usual
        assert_accurate(name, got[name], same_dtype[name], value, noise=noise)


@pytest.mark.parametrize("name", TABLE)
def test_fastlora_and_peft_are_the_same(name: str, tmp_path: Path) -> None:
    row = TABLE[name]
    task = MODELS[row.model][0]
    ours, theirs = build(fastlora, row), build(peft, row)
    config = getattr(peft, row.method)(**row.settings)
    own = fastlora.PeftConfig.from_dict(config.to_dict()).to_dict()
    assert fields(own, row) == fields(getattr(fastlora, row.method)(**row.settings).to_dict(), row)
    embeddings = embeddings_of(build_base(row.model))

    # What trains.
    (mine, none), (stock, twins) = trained(ours), trained(theirs)
    assert mine.keys() == stock.keys()
    assert not none
    twice = sum(p.numel() for p in twins.values())
    assert all(p.data_ptr() == stock[key].data_ptr() for key, p in twins.items())
    count, total = theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == (count - twice, total - twice)
    for key, value in stock.items():
        assert mine[key].dtype == value.dtype, key
        same_start(row, key, mine[key].detach(), value.detach())
    move(theirs, ours)
    truth = build(peft, row).double()
    truth.load_state_dict(theirs.state_dict())
    if hasattr(truth, "config"):
        truth.config._experts_implementation = "eager"  # the other has no fp64

    # What they compute.
    for padding in PADDINGS if ours.active_peft_config.is_prompt_learning else ("right",):
        given = inputs(task, padding)
        assert_all_accurate(*(results(model, given, embeddings) for model in (ours, theirs, truth)))
    if row.settings.get("lora_dropout"):
        given = inputs(task)
        for model in (ours, theirs, truth):
            model.train()
        with masks.exported(ours) as drawn:
            got = results(ours, given, embeddings)
        assert drawn
        for model in (theirs, truth):
            masks.put_in(model, drawn)
        assert_all_accurate(got, *(results(model, given, embeddings) for model in (theirs, truth)))

    # What they store, and read of each other's.
    for model in (ours, theirs, truth):
        model.eval()
    assert_same_files(row, ours, theirs, tmp_path)
    given = inputs(task, "right")
    with torch.no_grad():
        expected = [outputs(model, given) for model in (ours, theirs, truth)]
        with ours.disable_adapter():
            assert differ(outputs(ours, given), expected[0])
        for library in (fastlora, peft):
            for side in ("ours", "theirs"):
                if side == "theirs" and (name, library) in UNREADABLE:
                    continue
                base = build_base(row.model).to(row.dtype)
                torch.manual_seed(11)  # PiSSA may split the base's weight by a random projection
                read = library.PeftModel.from_pretrained(
                    base, tmp_path / side, autocast_adapter_dtype=row.wide
                )
                assert_all_accurate(outputs(read, given), *expected[1:])


def differ(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return any(
        y.shape != other[name].shape or not torch.allclose(y, other[name], rtol=1e-3)
        for name, y in one.items()
    )


def assert_same_files(row: Row, ours: Any, theirs: Any, folder: Path) -> None:
    ours.save_pretrained(folder / "ours")
    theirs.save_pretrained(folder / "theirs")
    a, b = (load_file(folder / side / WEIGHTS) for side in ("ours", "theirs"))
    b = tensors_of_file(b)
    assert a.keys() == b.keys()
    for key, value in b.items():
        assert a[key].dtype == value.dtype, key
        torch.testing.assert_close(a[key], value, rtol=1e-5, atol=1e-6)
    c, d = (json.loads((folder / side / CONFIG).read_text()) for side in ("ours", "theirs"))
    assert fields(c, row) == fields(fields_of_file(d), row)
