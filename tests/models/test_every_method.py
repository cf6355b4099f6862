"""What all methods do alike: train under transformers' Trainer and TRL's SFTTrainer, resume, checkpoint, run under autocast."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import fastlora
from tests.every_method import BOTTLENECKS, FOUR_BITS, METHODS, PREFIXES, VIRTUAL
from tests.models.test_trainers import Tokens, word_tokenizer
from tests.tiny_models import logits, loss_and_grads, some_ids

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

EVERY = pytest.mark.parametrize("name", METHODS)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 3,
        "seed": 3,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }


def train(model: Any, folder: Path, resume: str | None = None, **changes: Any) -> Any:
    arguments = transformers.TrainingArguments(**settings(folder, **changes))
    data = Tokens(count=2)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@EVERY
def test_trainer_trains_and_resumes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    model = method.make()
    told = losses(train(model, tmp_path))
    assert told[-1] < told[0] - 0.01
    # Another start, which the checkpoint must replace; PiSSA's is the base's own.
    again = method.make(seed=1 if name == "pissa" else 8)
    resumed = train(again, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert losses(resumed)[-3:] == told[3:]
    mine = again.state_dict()
    assert mine.keys() == model.state_dict().keys()
    assert all(torch.equal(mine[key], value) for key, value in model.state_dict().items())
    # The checkpoint is an adapter like any other, for use.
    read = fastlora.load_adapter(method.base(), tmp_path / "checkpoint-6") if name not in FOUR_BITS else again  # fmt: skip
    torch.testing.assert_close(logits(read.eval(), some_ids()), logits(model.eval(), some_ids()))
    # And beside that only what Trainer needs.
    files = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert ("adapter_training.safetensors" in files) == (name in ("p-mlp", "p-lstm", "prefix-mlp"))
    assert ("adapter.safetensors" in files) == (name in BOTTLENECKS)


@pytest.mark.parametrize(
    "name", ["lora, copies", "ia3", "p-lstm", "prefix-mlp", "houlsby"]
)  # a layout each
def test_trainer_loads_the_best_model_at_the_end(name: str, tmp_path: Path) -> None:
    model = METHODS[name].make()
    changes: dict[str, Any] = {
        "max_steps": 4,
        "eval_steps": 1,
        "save_steps": 1,
        "learning_rate": 0.3,
    }
    trainer = train(model, tmp_path, eval_strategy="steps", load_best_model_at_end=True, **changes)
    told = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    best = min(told, key=told.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(told[best], rel=1e-6)
    assert not any(path.suffix == ".bin" for path in (tmp_path / f"checkpoint-{best}").iterdir() if path.name != "training_args.bin")  # fmt: skip


@EVERY
def test_sft_trainer(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    text = [" ".join(f"w{(i * 7 + j) % 80}" for j in range(10)) for i in range(2)]
    model = METHODS[name].make()
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    arguments = trl.SFTConfig(**settings(tmp_path, max_steps=4, max_length=16, bf16=False, gradient_checkpointing=name not in PREFIXES))  # fmt: skip
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": text}),
        processing_class=word_tokenizer(),
    )
    trainer.train()
    told = losses(trainer)
    assert told[-1] < told[0]
    now = dict(model.named_parameters())
    assert not [key for key, value in before.items() if torch.equal(now[key], value)]
    trainer.save_model()
    if name in FOUR_BITS:
        return
    library: Any = fastlora if name in BOTTLENECKS else peft
    read = library.PeftModel.from_pretrained(METHODS[name].base(), tmp_path)
    torch.testing.assert_close(logits(read.eval(), some_ids()), logits(model.eval(), some_ids()), rtol=1e-4, atol=1e-4)  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
@EVERY
def test_checkpointing_changes_no_gradient(name: str, reentrant: bool) -> None:
    """With dropout too, under autocast and without."""
    if name in PREFIXES:
        with pytest.raises(ValueError, match="a prefix is in the cache"):
            METHODS[name].make().gradient_checkpointing_enable({"use_reentrant": reentrant})
        return
    for autocast in (False, True):
        found = []
        for checkpointing in (False, True):
            model = METHODS[name].moved().train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            torch.manual_seed(6)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                found.append(loss_and_grads(model, some_ids())[1])
        plain, checkpointed = found
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert plain.keys() == checkpointed.keys() == trained
        assert all(grad.abs().sum() > 0 for grad in plain.values())
        for key, grad in plain.items():
            torch.testing.assert_close(checkpointed[key], grad, rtol=1e-5, atol=1e-7, msg=key)


@EVERY
def test_autocast_is_as_close_as_bf16_is(name: str) -> None:
    """Gradients under autocast are those of fp32, to what bf16 rounds; parameters and gradients keep their dtype."""
    model, ids = METHODS[name].moved(), some_ids()
    loss, exact = loss_and_grads(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        near, grads = loss_and_grads(model, ids)
    assert abs(float(near - loss)) < 0.02 * float(loss)
    assert {g.dtype for g in grads.values()} == {p.dtype for p in model.parameters() if p.requires_grad}  # fmt: skip
    want, got = (torch.cat([g.flatten() for g in one.values()]) for one in (exact, grads))
    assert float((got - want).norm()) < 0.1 * float(want.norm())
    assert float(want.norm()) > 0


def test_files_beside_each_other_are_of_one_save(tmp_path: Path) -> None:
    """The network of virtual tokens goes with what it made, or nothing is loaded."""
    method = METHODS["p-mlp"]
    first, second = method.moved(), method.moved(seed=4)
    first.save_pretrained(tmp_path, resumable=True)
    read = fastlora.load_adapter(method.base(), tmp_path, is_trainable=True)
    assert torch.equal(logits(read.eval(), some_ids()), logits(first, some_ids()))
    assert len([p for p in read.parameters() if p.requires_grad]) == 7  # the network's
    gathered = {key: value.clone() for key, value in first.state_dict().items()}
    second.save_pretrained(tmp_path / "gathered", state_dict=gathered, resumable=True)
    for file in ("adapter_model.safetensors", "adapter_training.safetensors"):
        mine, other = (load_file(folder / file) for folder in (tmp_path, tmp_path / "gathered"))
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], value) for key, value in other.items())
    second.save_pretrained(tmp_path / "other", resumable=True)
    before = {key: value.clone() for key, value in second.state_dict().items()}
    (tmp_path / "other" / "adapter_training.safetensors").replace(tmp_path / "adapter_training.safetensors")  # fmt: skip
    with pytest.raises(ValueError, match="not saved together"):
        fastlora.load_adapter(second, tmp_path)
    with pytest.raises(ValueError, match="resumable=True"):
        fastlora.load_adapter(second, tmp_path / "other")
    assert all(torch.equal(second.state_dict()[key], value) for key, value in before.items())
    first.save_pretrained(tmp_path)  # not for resuming: what is stale is gone
    assert not (tmp_path / "adapter_training.safetensors").exists()
    smaller = method._replace(config=lambda: _smaller(method))
    first.save_pretrained(tmp_path, resumable=True)
    with pytest.raises(ValueError, match="has shape"):
        fastlora.load_adapter(smaller.make(), tmp_path)


def _smaller(method: Any) -> Any:
    config = method.config()
    config.encoder_hidden_size = 8
    return config


def test_several_adapters_resume(tmp_path: Path) -> None:
    for name in ("lora", "houlsby", "p-mlp"):
        method, folder = METHODS[name], tmp_path / name.replace(", ", "-")
        models = [method.make(), method.make(seed=8)]
        for model in models:
            torch.manual_seed(9)
            model.add_adapter("second", method.config())
            model.set_adapter("second")
        told = losses(train(models[0], folder))
        resumed = losses(train(models[1], folder, resume=str(folder / "checkpoint-3")))
        assert resumed[-3:] == told[3:], name
        assert models[1].active_adapters == ["second"]
    assert set(VIRTUAL) < set(METHODS)
