"""add_weighted_adapter: against the exact sum of updates, and stock peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import fastlora
from fastlora import LoraConfig
from fastlora.models.combine import COMBINATIONS
from tests.tiny_models import (
    PlainNet,
    logits,
    plain_net,
    randomize_adapters,
    some_ids,
    tiny_llama,
)

CONFIGS = {
    "a": {"r": 4, "lora_alpha": 8, "target_modules": ["up", "head"]},
    "b": {"r": 4, "lora_alpha": 3, "target_modules": ["up", "down"]},
    "c": {"r": 2, "lora_alpha": 3, "target_modules": ["up"]},
}
NAMES = [f"layers.{i}.{part}" for i in (0, 1) for part in ("up", "down")] + ["head"]
PRUNED = [name for name in COMBINATIONS if name not in ("cat", "svd", "linear")]


def models(**changes: Any) -> tuple[fastlora.PeftModel, Any]:
    """Ours and stock peft's with the same three adapters."""
    configs = {name: {**config, **changes} for name, config in CONFIGS.items()}
    ours = fastlora.get_peft_model(plain_net(), LoraConfig(**configs["a"]), adapter_name="a")
    theirs = peft.get_peft_model(plain_net(), peft.LoraConfig(**configs["a"]), adapter_name="a")
    for name in ("b", "c"):
        ours.add_adapter(name, LoraConfig(**configs[name]))
        theirs.add_adapter(name, peft.LoraConfig(**configs[name]))
    randomize_adapters(ours, scale=0.3)
    values = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if ".lora_" in name:
                parameter.copy_(values[name.removesuffix(".weight")])
    return ours, theirs.eval()


def layer(model: Any, name: str) -> Any:
    return model.base_model.model.get_submodule(name)


def delta(model: Any, name: str, adapter: str) -> Tensor:
    """s B A of one of our layers, zero where it has no such adapter."""
    module = layer(model, name)
    if adapter not in getattr(module, "r", {}):
        return torch.zeros(module.out_features, module.in_features, dtype=torch.float64)
    a, b = module.lora_A[adapter].double(), module.lora_B[adapter].double()
    return b @ a * module.scaling[adapter]


def exact(model: Any, name: str, adapters: list[str], weights: list[float]) -> Tensor:
    return sum(w * delta(model, name, a) for a, w in zip(adapters, weights, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_cat_and_svd_are_the_exact_sum(kind: str, rslora: bool) -> None:
    ours, _ = models(use_rslora=rslora)
    adapters, weights = ["a", "b", "c"], [0.7, -1.3, 2.0]
    ours.add_weighted_adapter(adapters, weights, "sum", kind, svd_rank=10)
    for name in NAMES:
        want = exact(ours, name, adapters, weights)
        torch.testing.assert_close(delta(ours, name, "sum"), want, rtol=1e-5, atol=1e-5)
    assert ours.peft_config["sum"].r == 10
    assert ours.active_adapters == ["a"]
    assert not any(p.requires_grad for n, p in ours.named_parameters() if n.endswith(".sum"))


def test_cat_is_the_default_and_acts_like_the_stack() -> None:
    ours, _ = models()
    ids = some_ids()
    ours.set_adapter(["a", "b"])
    both = logits(ours, ids)
    ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    ours.set_adapter("sum")
    torch.testing.assert_close(logits(ours, ids), both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_svd_is_the_closest_of_its_rank(rank: int) -> None:
    ours, theirs = models()
    for model in (ours, theirs):
        model.add_weighted_adapter(["a", "b"], [1.0, -0.5], "sum", "svd", svd_rank=rank)
    for name in NAMES:
        want = exact(ours, name, ["a", "b"], [1.0, -0.5])
        u, s, vh = torch.linalg.svd(want)
        best = (u[:, :rank] * s[:rank]) @ vh[:rank]
        torch.testing.assert_close(delta(ours, name, "sum"), best, rtol=1e-4, atol=1e-5)
        stock = layer(theirs, name)
        if "sum" in stock.lora_A:
            torch.testing.assert_close(
                delta(ours, name, "sum").float(),
                stock.get_delta_weight("sum"),
                rtol=1e-4,
                atol=1e-4,
            )


@pytest.mark.parametrize("clamp", [0.5, 0.77, 0.9, 1.0])
def test_clamp_is_the_quantile_of_both_factors_values(clamp: float) -> None:
    """Not compared with peft's factors: singular vectors have either sign, and the quantile is of signed values."""
    ours, _ = models()
    ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "free", "svd", svd_rank=3)
    ours.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "svd", svd_rank=3, svd_clamp=clamp)
    for name in NAMES:
        module = layer(ours, name)
        a, b = module.lora_A["free"].double(), module.lora_B["free"].double()
        limit = float(torch.quantile(torch.cat([a.flatten(), b.flatten()]), clamp))
        for part, free in (("lora_A", a), ("lora_B", b)):
            torch.testing.assert_close(
                getattr(module, part)["sum"].double(),
                free.clamp(-limit, limit),
                rtol=1e-5,
                atol=1e-6,
            )


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("kind", ["linear", *PRUNED])
def test_the_others_as_in_peft(kind: str, density: float, method: str) -> None:
    ours, theirs = models()
    for model in (ours, theirs):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, about a density of 1
            model.add_weighted_adapter(
                ["a", "b"], [0.7, -1.3], "sum", kind, svd_rank=24, density=density, majority_sign_method=method
            )  # fmt: skip
    for name in NAMES:
        stock = layer(theirs, name)
        if density < 1 and kind.startswith("dare") and (kind.endswith("svd") or name != NAMES[0]):
            continue  # other random numbers: ours makes updates in fp64, and layers follow in another order
        torch.testing.assert_close(
            delta(ours, name, "sum").float(), stock.get_delta_weight("sum"), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", ["dare_linear_svd", "dare_ties_svd"])
def test_dare_of_updates_keeps_a_share_and_scales_it_up(kind: str) -> None:
    ours, _ = models()
    ours.add_weighted_adapter(["a", "b"], [1.0, 0.0], "sum", kind, svd_rank=24, density=0.5)
    want, got = delta(ours, "head", "a"), delta(ours, "head", "sum")
    kept = got.abs() > 1e-4 * got.abs().max()
    torch.testing.assert_close(got[kept], 2 * want[kept], rtol=1e-3, atol=1e-4)
    assert 0.4 < float(kept.double().mean()) < 0.6


def test_one_adapter_is_copied_exactly_whatever_the_kind() -> None:
    ours, _ = models()
    for kind in COMBINATIONS:
        ours.add_weighted_adapter(["c"], [-2.0], kind, kind, density=0.1)
        for name in NAMES:
            want = -2 * delta(ours, name, "c")
            torch.testing.assert_close(delta(ours, name, kind), want, rtol=1e-6, atol=1e-6)


def test_a_combination_is_saved_and_loaded_by_stock_peft(tmp_path: Path) -> None:
    ours, _ = models()
    ours.add_weighted_adapter(["a", "b", "c"], [1.0, 2.0, 3.0], "sum")
    ours.set_adapter("sum")
    ours.save_pretrained(tmp_path, selected_adapters=["sum"])
    theirs = peft.PeftModel.from_pretrained(plain_net(), tmp_path / "sum")
    ids = some_ids()
    torch.testing.assert_close(logits(theirs, ids), logits(ours, ids), rtol=1e-5, atol=1e-5)


def test_regular_expressions_and_lists_of_targets_are_united() -> None:
    model = fastlora.get_peft_model(plain_net(), LoraConfig(target_modules=r".*\.0\.up"), "a")
    model.add_adapter("b", LoraConfig(target_modules=["down", "layers.1.up"]))
    randomize_adapters(model)
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum")
    for name in NAMES[:4]:
        torch.testing.assert_close(delta(model, name, "sum"), exact(model, name, ["a", "b"], [1.0, 1.0]), rtol=1e-5, atol=1e-6)  # fmt: skip
    assert isinstance(model.get_base_model(), PlainNet)
    assert "sum" not in getattr(layer(model, "head"), "r", {})


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((["a"], [1.0, 2.0], "x"), "one weight for each"),
        (([], [], "x"), "one weight for each"),
        ((["a", "nobody"], [1.0, 1.0], "x"), "nobody"),
        ((["a", "b"], [1.0, float("inf")], "x"), "weights"),
        ((["a", "b"], [1.0, 1.0], "c"), "exists already"),
        ((["a", "b"], [1.0, 1.0], "x", "mean"), "combination_type"),
        ((["a", "c"], [1.0, 1.0], "x", "linear"), "one rank"),
        ((["a", "b"], [1.0, 1.0], "x", "ties"), "density"),
        ((["a", "b"], [1.0, 1.0], "x", "svd", 0), "svd_rank"),
        ((["a", "b"], [1.0, 1.0], "x", "svd", 1000), "svd_rank"),
        ((["a", "b"], [1.0, 1.0], "x.y"), "adapter_name"),
    ],
)
def test_bad_arguments_change_nothing(arguments: tuple[Any, ...], match: str) -> None:
    ours, _ = models()
    names = sorted(ours.state_dict())
    with pytest.raises(ValueError, match=match):
        ours.add_weighted_adapter(*arguments)
    assert sorted(ours.state_dict()) == names
    assert sorted(ours.peft_config) == ["a", "b", "c"]


def test_copies_cannot_be_combined() -> None:
    model = fastlora.get_peft_model(
        plain_net(), LoraConfig(target_modules=["up"], modules_to_save=["head"]), "a"
    )
    model.add_adapter("b", LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="modules_to_save"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "x")


def test_svd_never_makes_an_update() -> None:
    """No tensor as large as the weight is made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest, known = 0, set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in known:
                    largest = max(largest, value.numel())
            return out

    net = torch.nn.Sequential(torch.nn.Linear(300, 200))
    model = fastlora.get_peft_model(net, LoraConfig(r=2, target_modules=["0"]), "a")
    model.add_adapter("b", LoraConfig(r=3, target_modules=["0"]))
    randomize_adapters(model)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with Watch():
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "sum", "svd", svd_rank=5, svd_clamp=0.99)
    assert 0 < largest <= 5 * (300 + 200)


@pytest.mark.parametrize("order", [["a", "b"], ["b", "a"]])
@pytest.mark.parametrize(
    "narrow",
    [
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["layers.1.up"]},
    ],
    ids=str,
)
def test_modules_that_one_adapter_leaves_out_have_the_others_update(
    narrow: dict[str, Any], order: list[str]
) -> None:
    model = fastlora.get_peft_model(plain_net(), LoraConfig(target_modules=["up"], **narrow), "a")
    model.add_adapter("b", LoraConfig(target_modules=r".*\.(up|down)"))
    randomize_adapters(model)
    model.add_weighted_adapter(order, [1.0, 1.0], "sum")
    for name in NAMES[:4]:
        torch.testing.assert_close(delta(model, name, "sum"), exact(model, name, order, [1.0, 1.0]), rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_a_slot_for_hot_swapping_counts_with_its_adapters_rank(kind: str) -> None:
    totals = []
    for room in (None, 9):
        model, _ = models()
        if room is not None:
            fastlora.prepare_hotswap(model, room, "b")
        torch.manual_seed(0)
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], "sum", kind, density=0.5)
        totals.append([delta(model, name, "sum") for name in NAMES])
    torch.testing.assert_close(*totals, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", COMBINATIONS)
def test_ends_that_share_one_adapter_share_the_combination(kind: str) -> None:
    """ensure_weight_tying, of any of the adapters."""
    tied: dict[str, Any] = {"target_modules": ["lm_head", "q_proj"], "ensure_weight_tying": True}
    model = fastlora.get_peft_model(
        tiny_llama(tie_word_embeddings=True), LoraConfig(r=4, target_modules=["q_proj"]), "a"
    )
    for name in ("b", "c"):
        model.add_adapter(name, LoraConfig(r=4, **tied))
        model.set_adapter(name)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 0.7, -0.4], "sum", kind, density=0.5)
    first, last = layer(model, "model.embed_tokens"), layer(model, "lm_head")
    assert last.lora_embedding_A["sum"] is first.lora_embedding_A["sum"]
    torch.testing.assert_close(delta(model, "lm_head", "sum"), delta(model, "model.embed_tokens", "sum").t())  # fmt: skip
    if kind in ("cat", "svd"):
        names = ["a", "b", "c"]
        for name in ("lm_head", "model.layers.1.self_attn.q_proj"):
            wanted = exact(model, name, names, [1.0, 0.7, -0.4])
            if kind == "svd":
                u, s, vh = torch.linalg.svd(wanted)
                wanted = (u[:, :4] * s[:4]) @ vh[:4]
            torch.testing.assert_close(delta(model, name, "sum"), wanted, rtol=1e-4, atol=1e-5)
