"""Sampling text from a model: one way before and after training, with and without adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import InputError


@dataclass(frozen=True)
class Sampling:
    """Greedy, or at a temperature from the ``top_p`` nucleus (Holtzman et al. 2020)."""

    max_new_tokens: int = 128
    temperature: float = 0.8
    top_p: float = 0.95
    greedy: bool = False
    seed: int = 0

    def validate(self) -> None:
        """Raise ``InputError`` naming the option that cannot be."""
        if not 1 <= self.max_new_tokens <= 1 << 20:
            raise InputError(f"--max-new-tokens {self.max_new_tokens} must be at least 1")
        if not 0.0 < self.temperature <= 100.0:
            raise InputError(
                f"--temperature {self.temperature} must be above 0; for the likeliest token use --greedy"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InputError(f"--top-p {self.top_p} must be in (0, 1]")


def encode_prompt(prompt: str, tokenizer: Any, chat: bool) -> torch.Tensor:
    """int64 [1, n] ids of a raw text, or of one user turn in the tokenizer's chat template."""
    if chat:
        if not tokenizer.chat_template:
            raise InputError(
                "--chat needs a chat template and this tokenizer has none; leave --chat out"
            )
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt").input_ids
    if ids.numel() == 0:
        raise InputError("--prompt is empty, and this tokenizer has no token that begins a text")
    return ids.long()


def generate(model: Any, tokenizer: Any, ids: torch.Tensor, sampling: Sampling) -> str:
    """The continuation of ``ids``, without them. Global generators are left as they were."""
    device = next(model.parameters()).device
    # Every setting is given: generation_config.json must not make two models differ here.
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not sampling.greedy:
        choice = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
        }
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(sampling.seed)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=torch.ones_like(ids, device=device),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            use_cache=True,
            **choice,
        )
    model.train(was_training)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
