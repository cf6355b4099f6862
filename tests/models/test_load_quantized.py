"""load_quantized: checkpoints that transformers wrote in bitsandbytes' 4 bits."""

import pytest
import torch

import fastlora
from fastlora import LoraConfig, QLoRALinear
from tests.tiny_models import loss_and_grads, some_ids, tiny_llama

BF16 = torch.bfloat16


def saved(folder, quant_type="nf4", double_quant=True, storage=torch.uint8, **changes):
    """What transformers writes for a model loaded in 4 bits; returns that model."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("bitsandbytes")
    settings = {"hidden_size": 64, "intermediate_size": 128, **changes}
    tiny_llama(**settings).save_pretrained(folder / "base")
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
    from safetensors.torch import load_file, save_file

    path = folder / "quantized" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


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
