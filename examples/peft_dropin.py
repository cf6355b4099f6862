"""A stock PEFT model on fastlora's kernels: one more line. Runs on a CPU, with a tiny model made in
place."""

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fastlora

size = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
model = peft.get_peft_model(
    LlamaForCausalLM(size), peft.LoraConfig(r=8, target_modules="all-linear")
)
model = fastlora.accelerate(model)  # the one line; fastlora.restore(model) takes it back

optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
ids = torch.randint(0, 256, (4, 32))
for step in range(5):
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
print(sum(layer.accelerated for layer in fastlora.acceleration_report(model)), "layers ran fast")
model.save_pretrained("adapter")  # PEFT's own file, by PEFT's own method
