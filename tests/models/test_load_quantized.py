"""load_quantized: checkpoints that transformers wrote in bitsandbytes' 4 bits."""

import pytest
import torch

import fastlora
from fastlora import LoraConfig, NF4Tensor, QLoRALinear
from fastlora.io.quantize import quantize_checkpoint
from fastlora.quant.checkpoint import write_weight
from tests.tiny_models import loss_and_grads, some_ids, tiny_llama

BF16 = torch.bfloat16


def saved(folder, quant_type="nf4", double_quant=True, storage=torch.uint8, model=None, **changes):
    """What transformers writes for a model loaded in 4 bits; returns that model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = {"hidden_size": 64, "intermediate_size": 128, **changes}
    (model or tiny_llama(**settings)).save_pretrained(folder / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "base",
        device_map="cpu",
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant_type,
            bnb_4bit_use_double_quant=double_quant,
            bnb_4bit_compute_dtype=torch.float32,
            bnb_4bit_quant_storage=storage,
        ),
    )
    model.save_pretrained(folder / "quantized")
    return model.train()  # in eval bitsandbytes' CPU kernels repack it


COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
FAMILIES = {  # model_type -> what differs, and how many linears are in 4 bits
    "gpt_neox": ({"tie_word_embeddings": False}, 8),  # stored as embed_out, named lm_head
    "opt": ({"ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}, 12),
    "qwen2": ({**GROUPED, "tie_word_embeddings": True}, 14),
    "phi": ({}, 12),
    "gemma": ({**GROUPED, "head_dim": 16}, 14),
    "mixtral": ({**GROUPED, "num_local_experts": 3}, 8),  # experts stored one by one, fused
    "gpt2": ({"n_inner": 128, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}, 8),  # Conv1D
}


def tiny(family, **changes):
    """A random model of a family, the same every time."""
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family][0], **changes})  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms as well: none may get lost
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*stay in floats")
@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family, tmp_path):
    """Whatever keys transformers stores them under, written by it and by ``quantize_checkpoint``."""
    count, ids = FAMILIES[family][1], some_ids()
    theirs = saved(tmp_path, model=tiny(family))
    ours = fastlora.load_quantized(tmp_path / "quantized")
    assert sum(isinstance(m, QLoRALinear) for m in ours.modules()) == count
    with torch.no_grad():
        want, got = theirs(ids).logits, ours(ids).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    if family == "gpt2":
        with pytest.raises(ValueError, match=r"has no nn\.Linear but its output"):
            quantize_checkpoint(tmp_path / "base", tmp_path / "four")
        return
    names = quantize_checkpoint(tmp_path / "base", tmp_path / "four")
    read, weights = fastlora.load_quantized(tmp_path / "four"), tiny(family).state_dict()
    layers = {name: m for name, m in read.named_modules() if isinstance(m, QLoRALinear)}
    assert sorted(names) == sorted(layers) and len(names) == count
    for name, layer in layers.items():
        exact = NF4Tensor.quantize(weights.pop(f"{name}.weight")).state_dict()
        for key, value in layer.weight.state_dict().items():
            assert torch.equal(value, exact[key]), (name, key)
    for name, value in weights.items():
        assert torch.equal(read.state_dict()[name], value), name
    stock = transformers_reads(tmp_path / "four")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, stock(ids).logits, atol=1e-4, rtol=1e-4)


def transformers_reads(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").train()


def test_experts_stay_in_floats_and_a_warning_says_so(tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match="4 parameters of stacked matrices.*gate_up_proj.*147,456"):
        quantize_checkpoint(tmp_path / "base", tmp_path / "four")
    config = LoraConfig(r=4, target_modules=["q_proj"], quantize="nf4")
    with pytest.warns(UserWarning, match="4 parameters of stacked matrices"):
        fastlora.get_peft_model(tiny("mixtral"), config)


def rewritten(path, change):
    """A safetensors file with its tensors changed: ``change`` gets them by key."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


EXPERTS = "model.layers.1.block_sparse_moe.experts"


@pytest.mark.filterwarnings("ignore:.*stay in floats")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(in_nf4(t, f"{EXPERTS}.2.w1")), "experts.2.w1.weight: is in 4 bits, and "),
        (lambda t: t.pop(f"{EXPERTS}.2.w1.weight"), "experts.gate_up_proj cannot be made of them"),
        (lambda t: t.pop(f"{EXPERTS}.2.w2.weight"), "size mismatch for .*experts.down_proj"),
        (lambda t: [t.pop(f"{EXPERTS}.{i}.w2.weight") for i in range(3)], "missing .*down_proj"),
        (lambda t: t.update({f"{EXPERTS}.0.w4.weight": torch.ones(1)}), "unexpected .*w4"),
        (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(3, 64)}), "stored already"),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_put_together_are_named(change, message, tmp_path):
    tiny("mixtral").save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "four")
    rewritten(tmp_path / "four" / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        fastlora.load_quantized(tmp_path / "four")


def in_nf4(tensors, name):
    """As transformers 4 has left an expert's linear."""
    return write_weight(name, NF4Tensor.quantize(tensors[f"{name}.weight"]))


def test_what_older_versions_stored_beside_the_weights_is_passed_over(tmp_path):
    """As transformers does: causal masks and rotary frequencies, which the published GPT-NeoX checkpoints hold."""
    tiny("gpt_neox").save_pretrained(tmp_path / "base")
    layer = "gpt_neox.layers.0.attention"
    old = {f"{layer}.bias": torch.ones(1, 1, 64, 64), f"{layer}.masked_bias": torch.tensor(-1e9), f"{layer}.rotary_emb.inv_freq": torch.ones(2)}  # fmt: skip
    rewritten(tmp_path / "base" / "model.safetensors", lambda tensors: tensors.update(old))
    quantize_checkpoint(tmp_path / "base", tmp_path / "four")
    read = fastlora.load_quantized(tmp_path / "four")
    assert sum(isinstance(m, QLoRALinear) for m in read.modules()) == 8
    head = read.get_output_embeddings().weight
    assert torch.equal(head, tiny("gpt_neox").get_output_embeddings().weight)


def test_what_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    """A fused weight that transformers takes apart into linears, and keys that belong to nothing."""
    mapping = pytest.importorskip("transformers.conversion_mapping")
    loading = pytest.importorskip("transformers.core_model_loading")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"

    def fuse(tensors):
        for i in range(2):
            parts = [tensors.pop(f"model.layers.{i}.mlp.{n}_proj.weight") for n in ("gate", "up")]
            tensors[f"model.layers.{i}.mlp.gate_up.weight"] = torch.cat(parts)

    rewritten(file, fuse)
    with pytest.raises(
        ValueError, match=r"gate_up.weight'\] belong to nothing in a LlamaForCausalLM"
    ):
        quantize_checkpoint(tmp_path / "base", tmp_path / "four")
    splits = loading.WeightConverter("mlp.gate_up.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [loading.Chunk(dim=0)])  # fmt: skip
    monkeypatch.setitem(mapping._checkpoint_conversion_mapping_cache, "llama", [splits])
    with pytest.raises(
        ValueError,
        match=r"gate_up.weight: transformers computes .*gate_proj.weight of it \(Chunk\)",
    ):
        quantize_checkpoint(tmp_path / "base", tmp_path / "four")
    assert not (tmp_path / "four").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"quant_type": "fp4", "double_quant": False},
        {"storage": BF16, "attention_bias": True},
        {"tie_word_embeddings": True},
    ],
)
def test_a_prequantized_checkpoint_is_read_as_it_is(settings, tmp_path, device):
    theirs, ids = saved(tmp_path, **settings), some_ids()
    ours = fastlora.load_quantized(tmp_path / "quantized", device)
    with torch.no_grad():
        want = theirs(ids).logits
        got = ours(ids.to(device)).logits.cpu()
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert sum(isinstance(m, QLoRALinear) for m in ours.modules()) == 14
    assert not any(p.requires_grad or p.is_meta for p in ours.parameters())
    codes = ours.model.layers[0].mlp.up_proj.weight.codes
    model = fastlora.get_peft_model(ours, LoraConfig(r=4, target_modules=["up_proj"]))
    layer = model.get_base_model().model.layers[0].mlp.up_proj
    assert layer.weight.codes.data_ptr() == codes.data_ptr() and list(layer.r) == ["default"]
    loss, grads = loss_and_grads(model, ids.to(device))
    assert loss.isfinite() and len(grads) == 4


def test_adapters_over_a_read_checkpoint_rest_in_eval_and_leave_four_bits(tmp_path):
    saved(tmp_path)
    ours = fastlora.load_quantized(tmp_path / "quantized")
    before = list(ours.named_modules())
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["0.mlp"])
    with pytest.raises(ValueError, match="4-bit weights, which cannot be trained whole"):
        fastlora.get_peft_model(ours, config)
    assert list(ours.named_modules()) == before
    model = fastlora.get_peft_model(ours, LoraConfig(target_modules=["q_proj"], lora_dropout=0.5))
    assert not any(module.training for module in model.modules())


def test_it_is_read_without_bitsandbytes(tmp_path):
    import subprocess
    import sys

    saved(tmp_path)
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch, fastlora\n"
        f"model = fastlora.load_quantized({str(tmp_path / 'quantized')!r})\n"
        "print(model(torch.arange(5)[None]).logits.isfinite().all().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr[-2000:]


def damaged(folder, change):
    """The checkpoint with its tensors changed: ``change`` gets them by key."""
    rewritten(folder / "quantized" / "model.safetensors", change)


WEIGHT = "model.layers.0.mlp.up_proj.weight"
STATE = f"{WEIGHT}.quant_state.bitsandbytes__nf4"


def json_bytes(text):
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def with_state(**values):
    def change(tensors):
        import json

        state = json.loads(bytes(tensors[STATE].tolist()))
        tensors[STATE] = json_bytes(json.dumps(state | values))

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{WEIGHT}.absmax"), "absmax: missing"),
        (lambda t: t.pop(f"{WEIGHT}.nested_absmax"), "nested_absmax: missing"),
        (lambda t: t.update({WEIGHT: t[WEIGHT][:-1]}), "codes: got"),
        (lambda t: t.update({f"{WEIGHT}.absmax": t[f"{WEIGHT}.absmax"][:-1]}), "absmax: got"),
        (lambda t: t[f"{WEIGHT}.quant_map"].mul_(2), "code of its own"),
        (lambda t: t.update({STATE: json_bytes("{")}), "is no JSON text"),
        (lambda t: t.update({STATE: json_bytes("[" * 50_000)}), "is no JSON text"),
        (lambda t: t.update({STATE: torch.zeros(1 << 17, dtype=torch.uint8)}), "expected bytes"),
        (with_state(shape=[128, 64, 1]), "shape is"),
        (with_state(shape=[2**40, 2**40]), "shape is"),
        (with_state(shape=[64, 128]), "has shape"),
        (with_state(dtype="int8"), "dtype is 'int8'"),
        (with_state(dtype=[]), "dtype is"),
        (with_state(nested_offset=10**400), "beyond float32"),
        (with_state(nested_offset=float("nan")), "beyond float32"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(3)}), "size mismatch"),
        (lambda t: t.update({WEIGHT: torch.tensor(1.0)}), "codes: got"),
        (with_state(blocksize=48), "block_size: got 48"),
        (with_state(blocksize="64"), "blocksize is '64'"),
        (with_state(nested_blocksize=0), "nested"),
        (with_state(nested_offset="1"), "nested_offset"),
        (lambda t: t.pop("model.norm.weight"), "missing \\['model.norm.weight'\\]"),
        (lambda t: t.update({"stray": torch.zeros(1)}), "unexpected \\['stray'\\]"),
    ],
)
def test_a_damaged_checkpoint_is_named(change, message, tmp_path):
    saved(tmp_path)
    damaged(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        fastlora.load_quantized(tmp_path / "quantized")


def test_what_is_no_quantized_checkpoint_is_named(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="no bitsandbytes 4-bit"):
        fastlora.load_quantized(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        fastlora.load_quantized(tmp_path)
    whole = tmp_path / "quantized" / "model.safetensors"
    content = whole.read_bytes()
    for cut in (0, 7, 100, len(content) - 1):
        whole.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="no whole safetensors"):
            fastlora.load_quantized(tmp_path / "quantized")
    whole.unlink()
    with pytest.raises(FileNotFoundError, match="incomplete"):
        fastlora.load_quantized(tmp_path / "quantized")
    (tmp_path / "quantized" / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../base/model.safetensors"}}'
    )
    with pytest.raises(FileNotFoundError, match="incomplete"):
        fastlora.load_quantized(tmp_path / "quantized")
