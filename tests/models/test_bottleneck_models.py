"""Bottleneck adapters in whole models: places against formulas written around the model, files, the life of an adapter."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fastlora
from fastlora import HoulsbyConfig, ParallelConfig, PfeifferConfig, QLoRALinear
from tests.bottleneck_formula import adapted, of_place
from tests.tiny_models import (
    VOCABULARY,
    assert_unchanged,
    plain_net,
    snapshot,
    some_ids,
    tiny_llama,
)
from tests.tiny_zoo import TYPES, run, tiny

WEIGHTS, CONFIG = "adapter.safetensors", "adapter_config.json"
BOTH = {"mh_adapter": True, "output_adapter": True, "reduction_factor": 4}
PRESETS: dict[str, Callable[..., Any]] = {
    "houlsby": HoulsbyConfig,
    "pfeiffer": PfeifferConfig,
    "parallel": ParallelConfig,
}


def bump(model: Any, seed: int = 3) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.1)
    return model.eval()


# The truth: the model's own layers, their forward written anew with the adapter in its place.


def llama_layer(layer: Any, attention: Any, feed_forward: Any) -> Callable[..., Any]:
    def forward(x: Tensor, **kwargs: Any) -> Tensor:
        h, _ = layer.self_attn(hidden_states=layer.input_layernorm(x), **kwargs)
        x = x + attention(h, x, None)
        return x + feed_forward(layer.mlp(layer.post_attention_layernorm(x)), x, None)

    return forward


def gpt2_layer(layer: Any, attention: Any, feed_forward: Any) -> Callable[..., Any]:
    def forward(x: Tensor, past: Any = None, mask: Any = None, *_: Any, **kwargs: Any) -> Tensor:
        kwargs = {"past_key_values": past, "attention_mask": mask, **kwargs}
        x = x + attention(layer.attn(layer.ln_1(x), **kwargs)[0], x, None)
        return x + feed_forward(layer.mlp(layer.ln_2(x)), x, None)

    return forward


def bert_layer(layer: Any, attention: Any, feed_forward: Any) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kept = {k: v for k, v in kwargs.items() if not k.startswith("encoder_")}
        first, second = layer.attention.output, layer.output
        h = first.dense(layer.attention.self(x, *args[:1], **kept)[0])
        x = first.LayerNorm(attention(h, x, first.LayerNorm) + x)
        h = second.dense(layer.intermediate(x))
        return second.LayerNorm(feed_forward(h, x, second.LayerNorm) + x)

    return forward


# model_type -> layers of the model, forward of one, where the file has its two adapters
TRUTHS: dict[str, tuple[Any, Any, tuple[str, str]]] = {
    "llama": (
        lambda m: m.model.layers,
        llama_layer,
        ("model.layers.{}.attention_adapters", "model.layers.{}.output_adapters"),
    ),
    "gpt2": (
        lambda m: m.transformer.h,
        gpt2_layer,
        ("transformer.h.{}.attention_adapters", "transformer.h.{}.output_adapters"),
    ),
    "bert": (
        lambda m: m.bert.encoder.layer,
        bert_layer,
        ("bert.encoder.layer.{}.attention.output", "bert.encoder.layer.{}.output"),
    ),
}


def truth(kind: str, config: Any, tensors: dict[str, Tensor], ids: Tensor) -> Tensor:
    model = tiny(kind).double()
    layers, rewrite, places = TRUTHS[kind]

    def adapter(place: str) -> Callable[..., Tensor]:
        own = of_place(tensors, place)
        return lambda h, s, norm: adapted(own, config, h, s, norm) if own else h

    for i, layer in enumerate(layers(model)):
        layer.forward = rewrite(layer, *(adapter(place.format(i)) for place in places))
    return run(model, ids).logits


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", TRUTHS)
def test_outputs_are_those_of_the_formula(kind: str, preset: str, tmp_path: Path) -> None:
    ids = some_ids()
    config = PRESETS[preset](**BOTH)
    model = bump(fastlora.get_peft_model(tiny(kind), config))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert len(tensors) == 2 * 2 * 4
    exact = truth(kind, config, tensors, ids)
    base = run(tiny(kind), ids).logits
    torch.testing.assert_close(run(model, ids).logits.double(), exact, rtol=1e-4, atol=1e-4)
    assert (exact - base).norm() > 0.02 * base.norm()
    with model.disable_adapter():
        assert torch.equal(run(model, ids).logits, base)


@pytest.mark.parametrize("kind", TYPES)
def test_every_architecture_starts_as_its_base_trains_and_round_trips(
    kind: str, tmp_path: Path
) -> None:
    ids = some_ids()
    base = run(tiny(kind), ids).logits
    for preset, make in PRESETS.items():
        if (kind, preset) == ("gemma2", "pfeiffer"):
            continue  # refused: see below
        config = make(**BOTH, init_weights="mam_adapter")
        model = fastlora.get_peft_model(tiny(kind), config)
        torch.testing.assert_close(run(model, ids).logits, base, rtol=1e-5, atol=1e-5)
        layers = 4 if kind == "t5" else 2
        each = 2 * 8 * 32 + 8 + 32
        assert model.get_nb_trainable_parameters()[0] == layers * 2 * each
        bump(model)
        run(model, ids).loss.backward()
        for name, p in model.named_parameters():
            assert (p.grad is not None and bool(p.grad.any())) == p.requires_grad, name
        path = tmp_path / preset
        model.save_pretrained(path)
        read = fastlora.PeftModel.from_pretrained(tiny(kind), path)
        assert read.peft_config["default"].to_dict() | {"inference_mode": False} == (
            model.peft_config["default"].to_dict()
        )
        assert torch.equal(run(read, ids).logits, run(model, ids).logits)


def test_a_file_as_the_library_writes_it_is_read(tmp_path: Path) -> None:
    """Another adapter name, the whole configuration, and names from a model without the head, or with another one."""
    ids = some_ids()
    model = bump(fastlora.get_peft_model(tiny("bert"), PfeifferConfig(**BOTH)))
    out = run(model, ids).logits
    model.save_pretrained(tmp_path)
    tensors, text = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    del text["fastlora"]
    text.update(name="task", version="1.2.0", model_class="BertModel")
    (tmp_path / CONFIG).write_text(json.dumps(text))
    for strip in (False, True):
        renamed = {
            (key.removeprefix("bert.") if strip else key).replace(".default.", ".task."): value
            for key, value in tensors.items()
        }
        save_file(renamed, tmp_path / WEIGHTS)
        read = fastlora.load_adapter(tiny("bert"), tmp_path, "mine")
        assert read.active_adapters == ["mine"]
        assert torch.equal(run(read, ids).logits, out)
    headless = tiny("bert").bert
    read = fastlora.load_adapter(headless, tmp_path)
    hidden = model.get_base_model().bert(ids).last_hidden_state
    assert torch.equal(read(ids).last_hidden_state, hidden)


@pytest.mark.parametrize(
    "options",
    [
        {"ln_before": True, "ln_after": True, "scaling": "channel", "use_gating": True},
        {"leave_out": [0], "reduction_factor": {"1": 2}, "scaling": "learned"},
        {"modules_to_save": ["lm_head"], "exclude_modules": r".*self_attn"},
        {"target_modules": ["down_proj"], "dropout": 0.1},
        {"target_modules": r".*\.mlp", "is_parallel": True},
        {"target_modules": ["q_proj"], "is_parallel": True},
    ],
)
def test_options_round_trip(options: dict[str, Any], tmp_path: Path) -> None:
    ids = some_ids()
    model = bump(
        fastlora.get_peft_model(tiny_llama(), HoulsbyConfig(**{"reduction_factor": 4} | options))
    )
    out = run(model, ids).logits
    assert not torch.allclose(out, run(tiny_llama(), ids).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    read = fastlora.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(run(read, ids).logits, out)


def test_named_modules_are_adapted_from_their_own_input() -> None:
    ids = some_ids()
    config = ParallelConfig(target_modules=["mlp"], reduction_factor=4)
    model = bump(fastlora.get_peft_model(tiny_llama(), config))
    names = [n for n, m in model.named_modules() if type(m).__name__ == "BottleneckLayer"]
    assert names == [f"base_model.model.model.layers.{i}.mlp" for i in range(2)]
    base = tiny_llama()
    for i, layer in enumerate(base.model.layers):
        mlp = model.get_base_model().model.layers[i].mlp
        own = {k.split("default.")[1]: t.tensor for k, t in mlp.adapter_tensors("default").items()}
        layer.mlp.register_forward_hook(
            lambda m, args, y, own=own: adapted(own, config, y, args[0], None)
        )
    torch.testing.assert_close(run(model, ids).logits, run(base, ids).logits, rtol=1e-4, atol=1e-4)


# Architectures whose sublayers nobody told fastlora: model class, sizes, modules to name.
ELSEWHERE: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Falcon": ("ForCausalLM", {"num_attention_heads": 4}, ["self_attention", "mlp"]),
    "GPTJ": ("ForCausalLM", {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}, ["attn", "mlp"]),
    "Phi": ("ForCausalLM", {"num_attention_heads": 4, "intermediate_size": 48}, ["self_attn", "fc2"]),
    "Mamba": ("ForCausalLM", {"state_size": 4}, ["mixer"]),
    "DistilBert": ("ForMaskedLM", {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}, ["attention", "ffn"]),
    "Bart": (
        "ForConditionalGeneration",
        {"d_model": 32, **{f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}},
        ["self_attn", "fc2"],
    ),
}  # fmt: skip


def elsewhere(kind: str) -> Any:
    import transformers

    suffix, sizes, _ = ELSEWHERE[kind]
    usual = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    if not {"dim", "n_embd", "d_model"}.isdisjoint(sizes):
        usual = {"vocab_size": VOCABULARY}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**usual, **sizes)
    return getattr(transformers, kind + suffix)(config).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_other_architectures_by_named_modules(kind: str, preset: str, tmp_path: Path) -> None:
    ids, base = some_ids(), elsewhere(kind)
    names = ELSEWHERE[kind][2]
    wanted = [n for n, _ in base.named_modules() if n.rpartition(".")[2] in names]
    config = PRESETS[preset](reduction_factor=4, init_weights="mam_adapter", target_modules=names)
    model = fastlora.get_peft_model(elsewhere(kind), config)
    found = [n for n, m in model.named_modules() if type(m).__name__ == "BottleneckLayer"]
    assert [n.removeprefix("base_model.model.") for n in found] == wanted != []
    torch.testing.assert_close(model(ids)[0], base(ids)[0])
    out = bump(model)(ids)[0]
    assert not torch.allclose(out, base(ids)[0], atol=1e-3)
    out.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 4 * len(wanted)
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    model.save_pretrained(tmp_path)
    read = fastlora.PeftModel.from_pretrained(elsewhere(kind), tmp_path)
    assert torch.equal(read.eval()(ids)[0], out)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_training_lowers_the_loss_and_leaves_the_base(kind: str, preset: str) -> None:
    ids = some_ids()
    model = fastlora.get_peft_model(tiny(kind), PRESETS[preset](**BOTH, dropout=0.05)).train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = run(model, ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())


@pytest.mark.parametrize("preset", PRESETS)
def test_bf16_bases_and_autocast(preset: str) -> None:
    ids = some_ids()
    exact = run(bump(fastlora.get_peft_model(tiny_llama(), PRESETS[preset](**BOTH))), ids).logits
    half = bump(fastlora.get_peft_model(tiny_llama(dtype=torch.bfloat16), PRESETS[preset](**BOTH)))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    cast = bump(fastlora.get_peft_model(tiny_llama(), PRESETS[preset](**BOTH)))
    for model, autocast in ((half, False), (cast, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(model, ids)
        out.loss.backward()
        assert (out.logits.float() - exact).norm() < 0.05 * exact.norm()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_over_a_4_bit_base() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        layer.mlp.down_proj = QLoRALinear.from_linear(layer.mlp.down_proj, r=None)
    base = run(model, some_ids()).logits
    config = HoulsbyConfig(
        target_modules=["down_proj"], init_weights="mam_adapter", reduction_factor=8
    )
    model = fastlora.get_peft_model(model, config)
    assert torch.equal(run(model, some_ids()).logits, base)
    run(bump(model), some_ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("preset", PRESETS)
def test_several_adapters(preset: str) -> None:
    ids, config = some_ids(), PRESETS[preset](**BOTH)
    base = run(tiny_llama(), ids).logits
    model = bump(fastlora.get_peft_model(tiny_llama(), config))
    first = run(model, ids).logits
    model.add_adapter("second", PRESETS[preset](**{**BOTH, "reduction_factor": 8}))
    assert torch.equal(run(model, ids).logits, first)
    model.set_adapter("second")
    bump(model, seed=4)
    second = run(model, ids).logits
    assert all(".second." in n for n, p in model.named_parameters() if p.requires_grad)
    model.set_adapter(["default", "second"])
    both = run(model, ids).logits
    assert len({t.sum().item() for t in (base, first, second, both)}) == 4
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(twin, ids).logits, both)
    model.rename_adapter("second", "third")
    assert torch.equal(run(model, ids).logits, both)
    model.delete_adapter("third")
    assert torch.equal(run(model, ids).logits, first)
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_adapter()
    model.delete_adapter("default")
    assert torch.equal(run(model, ids).logits, base)


def test_generation_with_a_cache() -> None:
    ids = some_ids()
    for make in PRESETS.values():
        model = bump(fastlora.get_peft_model(tiny_llama(), make(**BOTH)))
        outs = [
            model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, use_cache=cached)
            for cached in (False, True)
        ]
        assert torch.equal(*outs)


def opt_350m() -> Any:
    return tiny("opt", do_layer_norm_before=False)


def bloom_post() -> Any:
    return tiny("bloom", apply_residual_connection_post_layernorm=True)


@pytest.mark.parametrize(
    ("make", "config", "message"),
    [
        (plain_net, HoulsbyConfig(), "plain torch model.*name the modules"),
        (plain_net, HoulsbyConfig(target_modules=["nothing"]), "nothing"),
        (plain_net, HoulsbyConfig(target_modules=["layers"]), "ModuleList has no output"),
        (plain_net, HoulsbyConfig(target_modules=["norm"]), "how wide"),
        (tiny_llama, HoulsbyConfig(mh_adapter=False, output_adapter=False), "both are False"),
        (tiny_llama, HoulsbyConfig(leave_out=[7]), r"leave_out: got \[7\]"),
        (tiny_llama, HoulsbyConfig(leave_out=[0, 1]), "no layer"),
        (tiny_llama, HoulsbyConfig(reduction_factor={"0": 2}), "neither layer 1"),
        (tiny_llama, HoulsbyConfig(original_ln_after=False), "original_ln_after"),
        (tiny_llama, PfeifferConfig(residual_before_ln="post_add"), "post_add"),
        (opt_350m, ParallelConfig(), "do_layer_norm_before"),
        (bloom_post, PfeifferConfig(), "original_ln_before: this model adds normed"),
        (lambda: tiny("gemma2"), PfeifferConfig(), "norms of its own"),
    ],
)
def test_what_cannot_be_adapted_is_named_and_nothing_changes(
    make: Callable[[], nn.Module], config: Any, message: str
) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        fastlora.get_peft_model(model, config)
    assert_unchanged(model, before)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_files_change_nothing(tmp_path: Path) -> None:
    model = bump(fastlora.get_peft_model(tiny_llama(), ParallelConfig(**BOTH)))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / WEIGHTS)
    base = tiny_llama()
    before = snapshot(base)
    with pytest.raises(ValueError, match="lacks 1"):
        fastlora.load_adapter(base, tmp_path)
    assert_unchanged(base, before)
    assert not any(m._forward_pre_hooks for m in base.modules())  # the taps are off again
    (tmp_path / WEIGHTS).rename(tmp_path / "pytorch_adapter.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_adapter\.bin.*not read"):
        fastlora.load_adapter(base, tmp_path)
    other = fastlora.get_peft_model(tiny_llama(), HoulsbyConfig(**BOTH))
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"has non_linearity='relu'|has scaling=4\.0"):
        other.load_adapter(tmp_path, "default")


def test_a_second_adapter_is_placed_alike() -> None:
    model = fastlora.get_peft_model(tiny_llama(), HoulsbyConfig(**BOTH))
    before = snapshot(model)
    with pytest.raises(ValueError, match="place this one alike"):
        model.add_adapter("other", HoulsbyConfig(target_modules=["mlp"]))
    assert_unchanged(model, before)
