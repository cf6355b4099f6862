"""transformers' Trainer and TRL's SFTTrainer: fastlora's own PeftModel, and an accelerated stock
model, unchanged code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors
import torch

import fastlora
from fastlora import LoraConfig, QLoRALinear
from fastlora.layers import LoRAWrapper
from tests.tiny_models import VOCABULARY, logits, randomize_adapters, some_ids, tiny_llama

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "v_proj", "down_proj"]


class Tokens(torch.utils.data.Dataset):
    def __init__(self, count: int = 16, length: int = 8) -> None:
        self.rows = some_ids(seed=9, rows=count, length=length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def own(dropout: float = 0.1, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout, **settings)
    return fastlora.get_peft_model(tiny_llama(), config)


def stock(dropout: float = 0.0, **settings: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=dropout, **settings)
    return peft.get_peft_model(tiny_llama(), config)


def train(model: Any, folder: Path, resume: Any = None, **changes: Any) -> list[float]:
    """Train and give the loss of every step (of the steps after the resumed one)."""
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "save_steps": 3,
        "seed": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = transformers.TrainingArguments(**{**settings, **changes})
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Tokens())
    trainer.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_checkpoints_hold_the_adapter_alone_and_resume_to_the_same_bits(
    tmp_path: Path, quantize: str | None
) -> None:
    model = own(quantize=quantize)
    base_layers = sum(isinstance(m, QLoRALinear) for m in model.modules())
    assert base_layers == (14 if quantize else 0)
    losses = train(model, tmp_path / "a")
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "a" / "checkpoint-3"
    files = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= files
    assert not files & {"model.safetensors", "pytorch_model.bin"}
    with safetensors.safe_open(checkpoint / "adapter_model.safetensors", "pt") as stored:
        keys = set(stored.keys())
    assert len(keys) == 12 and all(k.endswith(("lora_A.weight", "lora_B.weight")) for k in keys)
    adapter_bytes = (checkpoint / "adapter_model.safetensors").stat().st_size
    assert adapter_bytes < 4 * model.get_nb_trainable_parameters()[0] + 4096
    again = own(quantize=quantize)
    randomize_adapters(again)  # what the checkpoint must replace
    resumed = train(again, tmp_path / "a", resume=str(checkpoint))
    assert resumed[-3:] == losses[3:]
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # Stock PEFT reads it, over the weights that the base stands for.
    last = tmp_path / "a" / "checkpoint-6"
    floats = tiny_llama()
    with torch.no_grad():
        for name, layer in model.get_base_model().named_modules():
            if isinstance(layer, QLoRALinear):
                floats.get_submodule(name).weight.copy_(layer.weight.dequantize())
    read = peft.PeftModel.from_pretrained(floats, last)
    torch.testing.assert_close(logits(read, some_ids()), logits(model.eval(), some_ids()))


def test_the_usual_qlora_recipe(tmp_path: Path, device: torch.device) -> None:
    """prepare_model_for_kbit_training, bf16 by autocast, and every layer computed again in backward."""
    pytest.importorskip("bitsandbytes")
    from tests.models.test_quantized import READING, prepared

    def adapters(model: Any) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

    def trained(model: Any, folder: str) -> tuple[torch.Tensor, torch.Tensor, dict[Any, int]]:
        before = adapters(model)
        fastlora.reset_launches()
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}  # fmt: skip
        losses = train(model, tmp_path / folder, bf16=True, use_cpu=device.type == "cpu", learning_rate=5e-3, **checkpointing)  # fmt: skip
        return torch.tensor(losses), adapters(model) - before, fastlora.launches()

    want, moved, nothing = trained(prepared(device), "stock")
    got, ours, ran = trained(fastlora.accelerate(prepared(device)), "accelerated")
    assert not nothing and len(got) == 6
    assert sum(n for (op, _), n in ran.items() if op in READING) >= 6 * (14 + 14 + 11)
    assert (got - want).abs().max() < 2e-3 * want[0]
    # 0.06 on a CPU: Adam takes whole steps by gradients that are noise. A scaling wrong by a tenth makes it 0.37.
    assert 0 < (ours - moved).norm() < 0.15 * moved.norm()


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = own(dropout=0.0)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    data = Tokens()
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, eval_dataset=data
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    read = fastlora.load_adapter(tiny_llama(), best)
    torch.testing.assert_close(logits(model.eval(), some_ids()), logits(read, some_ids()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_same_losses_as_stock_peft_with_accumulation_and_checkpointing(
    tmp_path: Path, reentrant: bool
) -> None:
    changes: dict[str, Any] = {
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        "max_steps": 3,
    }
    want = train(stock(), tmp_path / "stock", **changes)
    fastlora.reset_launches()
    assert train(own(dropout=0.0), tmp_path / "own", **changes) == pytest.approx(want, rel=1e-4)
    assert fastlora.launches()
    fastlora.reset_launches()
    fast = fastlora.accelerate(stock())
    assert train(fast, tmp_path / "fast", **changes) == pytest.approx(want, rel=1e-4)
    assert fastlora.launches()


def test_pefts_state_dict_functions_carry_the_adapter(tmp_path: Path) -> None:
    """accelerate's FSDP checkpoints go through these two."""
    model, other = own(), own()
    randomize_adapters(model)
    state = peft.get_peft_model_state_dict(model)
    assert any(".lora_A" in key for key in state)
    peft.set_peft_model_state_dict(other, state)
    assert torch.equal(logits(other.eval(), some_ids()), logits(model.eval(), some_ids()))


def test_sft_trainer_refuses_an_adapted_output_layer(tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="lm_head"):
        sft(fastlora.get_peft_model(tiny_llama(), config), tmp_path)


def test_an_accelerated_model_saves_and_resumes_as_stock(tmp_path: Path) -> None:
    losses = train(fastlora.accelerate(stock()), tmp_path)
    assert losses == pytest.approx(train(stock(), tmp_path / "stock"), rel=1e-4)
    config = json.loads((tmp_path / "checkpoint-3" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    again = fastlora.accelerate(stock())
    resumed = train(again, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert resumed[-3:] == pytest.approx(losses[3:], rel=1e-4)


def quantised(folder: Path, **settings: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=transformers.BitsAndBytesConfig(**settings),
        device_map="cpu",
        dtype=torch.float32,
    )


BITS: list[dict[str, Any]] = [
    {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    {"load_in_8bit": True},
]


@pytest.mark.parametrize("bits", BITS, ids=["4bit", "8bit"])
def test_trainer_accepts_a_quantised_base(tmp_path: Path, bits: dict[str, Any]) -> None:
    base = quantised(tmp_path / "base", **bits)
    ids = some_ids()
    with torch.no_grad():
        before = logits(base, ids)
    torch.manual_seed(1)
    model = fastlora.get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    assert isinstance(base.model.layers[0].self_attn.q_proj, LoRAWrapper)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    if "load_in_4bit" in bits:
        weights = sum(
            p.numel() for p in tiny_llama(hidden_size=64, intermediate_size=128).parameters()
        )
        assert (
            sum(model.get_nb_trainable_parameters()[1:])
            == weights + model.get_nb_trainable_parameters()[0]
        )
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids), before)
    losses = train(model, tmp_path / "run")
    assert losses[-1] < losses[0]
    checkpoint = tmp_path / "run" / "checkpoint-6"
    assert not (checkpoint / "model.safetensors").exists()
    fresh = quantised(tmp_path / "base", **bits)
    model.eval()
    with torch.no_grad():
        trained = logits(model, ids)
        read = peft.PeftModel.from_pretrained(fresh, checkpoint)
        torch.testing.assert_close(logits(read, ids), trained, atol=1e-4, rtol=1e-4)
        again = fastlora.load_adapter(quantised(tmp_path / "base", **bits), checkpoint)
        assert torch.equal(logits(again, ids), trained)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
    fresh = quantised(tmp_path / "base", **bits)
    with pytest.raises(ValueError, match="quantised"):
        fastlora.get_peft_model(fresh, config)


def test_accelerate_leaves_what_bitsandbytes_packed_anew_and_says_so(tmp_path: Path) -> None:
    """Its CPU kernels repack a weight in eval, which no other kernel reads."""
    base = quantised(tmp_path, **BITS[0])
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    randomize_adapters(model)
    with torch.no_grad():
        want = logits(model, some_ids())
        layer = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer
        repacked = getattr(layer.weight.quant_state, "packing_format_for_cpu", False)
        got = logits(fastlora.accelerate(model), some_ids())
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    report = fastlora.acceleration_report(model)
    assert [r.accelerated for r in report] == [not repacked] * 2
    assert not repacked or "packed anew" in report[0].reason


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(VOCABULARY - 4))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def sft(model: Any, folder: Path) -> tuple[list[float], Any]:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    text = [" ".join(f"w{(i * 7 + j) % 80}" for j in range(10)) for i in range(16)]
    arguments = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=3,
        learning_rate=0.05,
        per_device_train_batch_size=2,
        logging_steps=1,
        max_length=16,
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": text}),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    trainer.save_model()
    return [e["loss"] for e in trainer.state.log_history if "loss" in e], trainer


@pytest.mark.parametrize("build", [own, lambda dropout: fastlora.accelerate(stock(dropout))])
def test_sft_trainer(tmp_path: Path, build: Callable[..., Any]) -> None:
    want, _ = sft(stock(0.0), tmp_path / "stock")
    fastlora.reset_launches()
    losses, trainer = sft(build(dropout=0.0), tmp_path / "fast")
    assert losses == pytest.approx(want, rel=1e-4)
    assert fastlora.launches()
    read = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "fast")
    torch.testing.assert_close(
        logits(read, some_ids()), logits(trainer.model.eval(), some_ids()), atol=1e-5, rtol=1e-5
    )
