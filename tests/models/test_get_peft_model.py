"""get_peft_model: what it changes, that a refusal changes nothing, and the model it returns."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import fastlora
from fastlora import LoraConfig, LoRALinear
from fastlora.layers import LoRAWrapper, TrainableCopy
from tests.tiny_models import (
    PlainNet,
    assert_unchanged,
    logits,
    plain_net,
    randomize_adapters,
    snapshot,
    some_ids,
    tiny_llama,
)

MODELS = {"plain": plain_net, "llama": tiny_llama}
TARGETS = {"plain": ["up", "down"], "llama": ["q_proj", "down_proj"]}


def adapted(kind: str = "plain", **settings: Any) -> fastlora.PeftModel:
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **settings})
    return fastlora.get_peft_model(MODELS[kind](), config)


@pytest.mark.parametrize("kind", MODELS)
def test_starts_as_the_base_and_differs_once_trained(kind: str) -> None:
    ids = some_ids()
    model = adapted(kind)
    base = logits(MODELS[kind](), ids)
    torch.testing.assert_close(logits(model, ids), base)
    randomize_adapters(model)
    changed = logits(model, ids)
    assert not torch.allclose(changed, base, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), base)
    assert torch.equal(logits(model, ids), changed)
    model.disable_adapter_layers()
    with model.disable_adapter():
        pass
    torch.testing.assert_close(logits(model, ids), base)
    model.enable_adapter_layers()
    assert torch.equal(logits(model, ids), changed)


@pytest.mark.parametrize("kind", MODELS)
def test_kind_of_the_result(kind: str) -> None:
    model = adapted(kind)
    assert isinstance(model, fastlora.PeftModel)
    assert isinstance(model, peft.PeftModel) == (kind == "llama")
    assert model.get_base_model() is model.base_model.model
    assert model.active_adapters == ["default"]
    assert model.active_adapter == "default"
    assert isinstance(model.peft_config["default"], LoraConfig)
    assert not model.active_peft_config.is_prompt_learning


@pytest.mark.parametrize("kind", MODELS)
def test_exactly_the_adapters_train(kind: str) -> None:
    model = adapted(kind)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_A.default" in n or ".lora_B.default" in n for n in trained)
    record = model.trainable_record()
    assert [entry["name"] for entry in record] == trained
    parameters = dict(model.named_parameters())
    for entry in record:
        parameter = parameters[entry["name"]]
        assert entry["shape"] == list(parameter.shape)
        assert entry["count"] == parameter.numel()
        assert entry["dtype"] == "float32"
    assert model.get_nb_trainable_parameters() == (
        sum(e["count"] for e in record),
        sum(p.numel() for p in model.parameters()),
    )


def test_prints_what_peft_prints(capsys: pytest.CaptureFixture[str]) -> None:
    adapted("llama").print_trainable_parameters()
    ours = capsys.readouterr().out
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS["llama"])
    peft.get_peft_model(tiny_llama(), config).print_trainable_parameters()
    assert ours == capsys.readouterr().out


def test_the_callers_config_is_not_changed() -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="SEQ_CLS")
    before = copy.deepcopy(config)
    fastlora.get_peft_model(plain_net(), config)
    assert config == before


def test_a_peft_config_works_too() -> None:
    model = fastlora.get_peft_model(plain_net(), peft.LoraConfig(r=2, target_modules=["up"]))
    assert model.peft_config["default"].r == 2
    with pytest.raises(TypeError, match="dict"):
        fastlora.get_peft_model(plain_net(), {"r": 2})
    with pytest.raises(NotImplementedError, match="use_qalora"):
        fastlora.get_peft_model(
            plain_net(), peft.LoraConfig(use_qalora=True, target_modules=["up"])
        )


def broken_weight(model: PlainNet) -> None:
    model.layers[1]["down"].weight = nn.Parameter(torch.full((24, 40), torch.nan))


def tie(model: PlainNet) -> None:
    model.layers[1]["up"].weight = model.layers[0]["up"].weight


def share(model: PlainNet) -> None:
    model.layers[1]["up"] = model.layers[0]["up"]


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (None, {"target_modules": ["nothing_like_it"]}, r"matches no module.*'down'.*'up'"),
        (None, {"target_modules": ["up"], "exclude_modules": ["up"]}, "matches no module"),
        (None, {"target_modules": ["up"], "layers_to_transform": [7]}, "layers_to_transform"),
        (None, {"target_modules": ["up", "norm"]}, "LayerNorm.*accelerate"),
        (None, {"target_modules": ["up", "norm"]}, "LayerNorm"),
        (None, {"target_modules": ["up", "layers"]}, "ModuleList"),
        (None, {"target_modules": ["up"], "modules_to_save": ["nope"]}, "modules_to_save: 'nope'"),
        (None, {"target_modules": ["up"], "modules_to_save": ["layers.0"]}, "no forward"),
        (None, {"init_lora_weights": "pissa", "r": 25}, "layers.0.up.*r: got 25"),
        (broken_weight, {"init_lora_weights": "pissa"}, "layers.1.down"),
        (tie, {"init_lora_weights": "olora"}, "tied"),
        (share, {}, "several places"),
    ],
)
def test_a_refusal_leaves_the_model_exactly_as_it_was(
    change: Callable[[PlainNet], None] | None, settings: dict[str, Any], message: str
) -> None:
    model = plain_net()
    if change is not None:
        change(model)
    model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises((ValueError, RuntimeError), match=message):
        fastlora.get_peft_model(model, LoraConfig(**{"target_modules": ["up", "down"], **settings}))
    assert_unchanged(model, before)


def test_refused_models() -> None:
    config = LoraConfig(target_modules=["up"])
    with pytest.raises(TypeError, match="function"):
        fastlora.get_peft_model(plain_net, config)
    with pytest.raises(ValueError, match="fastlora adapters already"):
        fastlora.get_peft_model(fastlora.get_peft_model(plain_net(), config), config)
    with pytest.raises(ValueError, match="fastlora adapters already"):
        fastlora.get_peft_model(adapted().get_base_model(), config)
    stock = peft.get_peft_model(plain_net(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="accelerate"):
        fastlora.get_peft_model(stock, config)
    with pytest.raises(ValueError, match=r"torch\.compile"):
        fastlora.get_peft_model(torch.compile(plain_net()), config)
    for name in ("", "a.b", "../x", "keys", "weight", 3):
        with pytest.raises(ValueError, match="adapter_name"):
            fastlora.get_peft_model(plain_net(), config, name)


def test_misspelt_patterns_and_exclusions_warn() -> None:
    with pytest.warns(UserWarning, match="rank_pattern.*upp"):
        adapted(rank_pattern={"upp": 2})
    with pytest.warns(UserWarning, match="exclude_modules"):
        adapted(exclude_modules=["upp"])


def test_rank_and_alpha_patterns() -> None:
    model = adapted(rank_pattern={r"0\.up": 2}, alpha_pattern={"down": 3}, use_rslora=True)
    layers = model.get_base_model().layers
    assert layers[0]["up"].r == {"default": 2}
    assert layers[1]["up"].r == {"default": 4}
    assert layers[0]["up"].scaling["default"] == pytest.approx(8 / 2**0.5)
    assert layers[0]["down"].scaling["default"] == pytest.approx(3 / 2)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_trained_biases_are_pefts(bias: str) -> None:
    settings = {"r": 4, "target_modules": ["up"], "bias": bias}
    ours = fastlora.get_peft_model(plain_net(), LoraConfig(**settings))
    theirs = peft.get_peft_model(plain_net(), peft.LoraConfig(**settings))

    def biases(model: nn.Module) -> set[str]:
        names = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
        return {name.replace("base_layer.", "") for name in names}

    assert biases(ours) == biases(theirs)
    assert len(biases(ours)) == {"none": 0, "all": 4, "lora_only": 2}[bias]
    ours.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in ours.parameters())


def test_modules_to_save_trains_a_copy_and_gives_the_original_back() -> None:
    ids, base = some_ids(), plain_net()
    before = logits(base, ids)
    model = fastlora.get_peft_model(
        base, LoraConfig(r=4, target_modules=["up"], modules_to_save=["head"])
    )
    head = base.head
    assert isinstance(head, TrainableCopy)
    assert head.weight is head.modules_to_save["default"].weight
    assert head.out_features == 96
    assert head.weight.requires_grad
    assert not head.original_module.weight.requires_grad
    with torch.no_grad():
        head.weight.zero_()
        head.bias.fill_(3.0)
    assert torch.equal(logits(model, ids), torch.full_like(before, 3.0))
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, ids), before)
        assert head.weight is head.original_module.weight
    with pytest.raises(AttributeError, match="nonsense"):
        _ = head.nonsense


def test_task_heads_train_as_in_peft() -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
        pad_token_id=0,
    )
    settings = {"r": 2, "target_modules": "all-linear", "task_type": "SEQ_CLS"}
    ours = fastlora.get_peft_model(LlamaForSequenceClassification(small), LoraConfig(**settings))
    theirs = peft.get_peft_model(LlamaForSequenceClassification(small), peft.LoraConfig(**settings))
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    trained = [n for n, p in ours.named_parameters() if p.requires_grad]
    assert "base_model.model.score.modules_to_save.default.weight" in trained


def test_tied_weights_stay_tied_under_lora_and_warn_under_modules_to_save() -> None:
    base = tiny_llama(tie_word_embeddings=True)
    model = fastlora.get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head"]))
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert isinstance(base.lm_head, LoRALinear)
    randomize_adapters(model)
    assert torch.isfinite(logits(model, some_ids())).all()
    with pytest.warns(UserWarning, match="shares weights"):
        fastlora.get_peft_model(
            tiny_llama(tie_word_embeddings=True),
            LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        )


def test_linears_that_are_not_plain_keep_their_own_forward() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    base = nn.Sequential(Doubled(6, 5), nn.Linear(5, 4), nn.Linear(4, 3))
    base[1].register_forward_hook(lambda module, args, out: out + 1)
    x = torch.randn(2, 6)
    before = base(x)
    model = fastlora.get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1", "2"]))
    kinds = [type(layer) for layer in model.get_base_model()]
    assert kinds == [LoRAWrapper, LoRAWrapper, LoRALinear]
    torch.testing.assert_close(model(x), before)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("targets", [["linear1", "linear2"], "all-linear"])
def test_torchs_fused_encoder_does_not_bypass_the_adapters(targets: Any) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    base = nn.TransformerEncoder(block, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        before = base(x, src_key_padding_mask=padding)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = fastlora.get_peft_model(base, LoraConfig(r=4, target_modules=targets))
    assert (targets == "all-linear") == any("out_proj" in str(w.message) for w in caught)
    randomize_adapters(model, scale=0.5)
    with torch.no_grad():
        in_eval = model(x, src_key_padding_mask=padding)
    with_grad = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(in_eval, with_grad.detach())
    assert not torch.allclose(in_eval[0], before[0], atol=1e-3)


def test_attention_output_projection_is_refused_by_name() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    before = snapshot(block)
    with pytest.raises(ValueError, match=r"self_attn\.out_proj.*MultiheadAttention"):
        fastlora.get_peft_model(block, LoraConfig(target_modules=["linear1", "out_proj"]))
    assert_unchanged(block, before)


def test_low_precision_base() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    model = fastlora.get_peft_model(tiny_llama(dtype=torch.bfloat16), config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    model = fastlora.get_peft_model(
        tiny_llama(dtype=torch.bfloat16), config, autocast_adapter_dtype=False
    )
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert logits(model, some_ids()).dtype == torch.bfloat16


def test_inference_mode_creates_frozen_adapters() -> None:
    assert adapted(inference_mode=True).trainable_record() == []


def test_modes_and_devices_are_kept() -> None:
    assert not any(m.training for m in adapted().modules())
    base = plain_net().train()
    model = fastlora.get_peft_model(base, LoraConfig(target_modules=["up"]))
    assert all(m.training for m in model.modules())
    with torch.device("meta"):
        base = PlainNet()
    model = fastlora.get_peft_model(base, LoraConfig(target_modules=["up"]))
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_delegates_to_the_base_model() -> None:
    model = adapted("llama")
    base = model.get_base_model()
    assert model.config is base.config
    assert model.get_input_embeddings() is base.get_input_embeddings()
    assert model.dtype == torch.float32
    assert model.can_generate()
    assert model.base_model.config is base.config
    with pytest.raises(AttributeError, match="nonsense"):
        _ = model.nonsense
    ids = some_ids(rows=1)
    out = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert torch.equal(out, base.generate(ids, max_new_tokens=3, do_sample=False))
    model.generation_config = copy.deepcopy(base.generation_config)
    model.generation_config.max_new_tokens = 2
    assert model.generate(ids, do_sample=False).shape[1] <= ids.shape[1] + 2


def test_methods_of_peft_that_are_not_there_say_so() -> None:
    model = adapted("llama")
    for name in ("get_prompt", "create_or_update_model_card"):
        with pytest.raises(NotImplementedError, match=name):
            getattr(model, name)("x")
    with pytest.raises(ValueError, match="other"):
        model.set_adapter("other")


@pytest.mark.parametrize("kind", MODELS)
def test_deepcopy_and_pickle(kind: str) -> None:
    model, ids = adapted(kind, modules_to_save=["norm"]), some_ids()
    randomize_adapters(model)
    expected = logits(model, ids)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert torch.equal(logits(twin, ids), expected)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(logits(loaded, ids), expected)
    assert loaded.peft_config == model.peft_config
    randomize_adapters(twin, seed=1)
    assert torch.equal(logits(model, ids), expected)


def test_state_dict_keys_are_stable() -> None:
    model = adapted(target_modules=["layers.0.up"], modules_to_save=["head"])
    assert [k for k in model.state_dict() if "layers.1" not in k] == [
        "base_model.model.embed.weight",
        "base_model.model.layers.0.up.weight",
        "base_model.model.layers.0.up.bias",
        "base_model.model.layers.0.up.lora_A.default",
        "base_model.model.layers.0.up.lora_B.default",
        "base_model.model.layers.0.down.weight",
        "base_model.model.norm.weight",
        "base_model.model.norm.bias",
        "base_model.model.head.original_module.weight",
        "base_model.model.head.original_module.bias",
        "base_model.model.head.modules_to_save.default.weight",
        "base_model.model.head.modules_to_save.default.bias",
    ]
    other = adapted(target_modules=["layers.0.up"], modules_to_save=["head"])
    randomize_adapters(model)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other, some_ids()), logits(model, some_ids()))


LIGHT = """
import sys, torch
from torch import nn
import fastlora
model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
model = fastlora.get_peft_model(model, fastlora.LoraConfig(r=2, target_modules="all-linear"))
model(torch.randn(3, 6)).sum().backward()
assert fastlora.acceleration_report(model) == [] and fastlora.restore(model) is model
heavy = {"transformers", "peft", "accelerate", "matplotlib", "bitsandbytes"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_plain_model_needs_neither_transformers_nor_peft() -> None:
    result = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


WITHOUT_PEFT = """
import sys
sys.modules["peft"] = None  # as if it were not installed
from tests.tiny_models import tiny_llama, some_ids
import fastlora
model = fastlora.get_peft_model(tiny_llama(), fastlora.LoraConfig(r=2))
assert type(model) is fastlora.PeftModel
model(some_ids()).logits.sum().backward()
"""


def test_a_transformers_model_without_peft_installed() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_PEFT], capture_output=True, text=True, cwd=root
    )
    assert result.returncode == 0, result.stderr
