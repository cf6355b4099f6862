"""LoRA in a plain torch model, without transformers or peft. Runs on a CPU."""

import torch
from torch import nn

import fastlora


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10))


model = fastlora.get_peft_model(network(), fastlora.LoraConfig(r=8, target_modules="all-linear"))
model.print_trainable_parameters()
x, target = torch.randn(256, 32), torch.randint(0, 10, (256,))
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for step in range(5):
    loss = nn.functional.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
fastlora.save_adapter(model, "adapter")
again = fastlora.load_adapter(network(), "adapter")
print("saved and loaded:", torch.equal(again(x), model.eval()(x)))
