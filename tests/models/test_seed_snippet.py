"""The snippet that PEFT is known by, run twice from one text: with stock peft, and with its import line changed to ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastlora
from tests.tiny_tokenizer import make_tokenizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

IMPORT = "from peft import LoraConfig, get_peft_model, PeftModel"
SNIPPET = f"""
{IMPORT}

model = base_model()
for parameter in model.parameters():
    parameter.requires_grad = False
    if parameter.ndim == 1:
        parameter.data = parameter.data.to(torch.float32)
model.gradient_checkpointing_enable()
model.enable_input_require_grads()

class CastOutputToFloat(nn.Sequential):
    def forward(self, x):
        return super().forward(x).to(torch.float32)

model.lm_head = CastOutputToFloat(model.lm_head)

config = LoraConfig(
    r=8,
    lora_alpha=32,
    target_modules=["query_key_value"],
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)
model = get_peft_model(model, config)
model.print_trainable_parameters()

trainer = transformers.Trainer(
    model=model,
    train_dataset=data,
    args=transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        warmup_steps=2,
        max_steps=6,
        learning_rate=2e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
)
model.config.use_cache = False
trainer.train()
model.save_pretrained(folder)

loaded = PeftModel.from_pretrained(base_model(), folder).eval()
batch = tokenizer("to be", return_tensors="pt")
tokens = loaded.generate(**batch, max_new_tokens=12, do_sample=False)
"""
QUOTES = ["to be, or not to be", "all the world's a stage", "what's in a name", "now is the winter"]


def tiny_bloom() -> Any:
    torch.manual_seed(0)
    config = transformers.BloomConfig(
        vocab_size=len(make_tokenizer()),
        hidden_size=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    return transformers.BloomForCausalLM(config)


def run(snippet: str, library: str, folder: Path, capsys: Any) -> dict[str, Any]:
    """What the snippet's names are at its end, with what it printed of its parameters."""
    tokenizer = make_tokenizer()
    names = {
        "torch": torch,
        "nn": nn,
        "transformers": transformers,
        "base_model": tiny_bloom,
        "tokenizer": tokenizer,
        "data": [copy.deepcopy(dict(tokenizer(quote))) for quote in QUOTES],
        "folder": str(folder),
    }
    capsys.readouterr()
    torch.manual_seed(1)
    exec(
        compile(snippet.replace(IMPORT, IMPORT.replace("peft", library, 1)), library, "exec"), names
    )
    printed = [line for line in capsys.readouterr().out.splitlines() if "trainable params" in line]
    return {**names, "printed": printed}


def losses(names: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([e["loss"] for e in names["trainer"].state.log_history if "loss" in e])


@pytest.mark.parametrize("dropout", ["0.05", "0.0"])
def test_it_runs_with_the_import_line_alone_changed(
    dropout: str, tmp_path: Path, capsys: Any
) -> None:
    assert SNIPPET.count(IMPORT) == 1
    text = SNIPPET.replace("lora_dropout=0.05", f"lora_dropout={dropout}")
    stock = run(text, "peft", tmp_path / "peft", capsys)
    own = run(text, "fastlora", tmp_path / "fastlora", capsys)
    assert type(stock["model"]).__module__.startswith("peft")
    assert isinstance(own["model"], fastlora.PeftModel)
    assert isinstance(own["loaded"], fastlora.PeftModel)
    assert own["printed"] == stock["printed"] != []

    trained = losses(own)
    assert len(trained) == 6
    assert trained[-1] < trained[0]
    if dropout == "0.0":
        torch.testing.assert_close(trained, losses(stock), rtol=1e-4, atol=1e-4)
        assert own["tokens"].tolist() == stock["tokens"].tolist()
    assert own["tokens"].shape[1] > own["batch"]["input_ids"].shape[1]

    # Each library's files, read by the other: the same outputs as by itself.
    for names in (stock, own):
        other = (fastlora if names is stock else peft).PeftModel
        read = other.from_pretrained(tiny_bloom(), names["folder"]).eval()
        ids = names["batch"]["input_ids"]
        with torch.no_grad():
            torch.testing.assert_close(read(ids).logits, names["loaded"](ids).logits)
            assert not torch.allclose(read(ids).logits, tiny_bloom().eval()(ids).logits)
    mine, theirs = (
        load_file(Path(names["folder"]) / "adapter_model.safetensors") for names in (own, stock)
    )
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
