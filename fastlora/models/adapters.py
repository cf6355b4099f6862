"""``Adapters``: the life of a model's adapters: added, stacked, switched, scaled, combined, renamed, deleted, merged."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..layers import AdapterLayer, LoRALayer
from ..layers.adapter import check_adapter_name
from ..layers.embedding import LoRAEmbedding
from ..layers.mixed import MixedBatch
from ..methods import LoraConfig, PeftConfig
from . import merge
from .merge import MergeReport


class Adapters(nn.Module):
    """What ``PeftModel`` does with adapters as wholes; it says which model they are in.

    ``_configs`` maps an adapter's name to its configuration, ``_active`` lists those that act.
    """

    _configs: dict[str, PeftConfig]
    _active: list[str]

    def get_base_model(self) -> nn.Module:
        """The model given to ``get_peft_model``, with the adapter layers in it."""
        raise NotImplementedError

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> its configuration."""
        return self._configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def peft_type(self) -> str | None:
        """The method of the adapters, by PEFT's name; None once all are deleted."""
        return next((config.peft_type for config in self._configs.values()), None)

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active, and not switched off."""
        return any(
            layer.adapters_enabled and any(name in layer.adapters for name in layer.active_adapters)
            for layer in self.adapter_layers()
        )

    # Which adapters act and train.

    def adapter_layers(self) -> Iterator[AdapterLayer]:
        """Every module that carries adapters."""
        return (m for m in self.get_base_model().modules() if isinstance(m, AdapterLayer))

    def _check_known(self, adapter_name: str) -> None:
        if adapter_name not in self._configs:
            raise ValueError(
                f"adapter_name: got {adapter_name!r}; this model has {sorted(self._configs)}"
            )

    def check_change(self, what: str) -> None:
        """ValueError if the adapters cannot be changed now: they are merged, or a mixed batch is going on."""
        for layer in self.adapter_layers():
            if layer.mixed is not None:
                raise ValueError(f"{what}: a mixed batch is going on; leave mixed_batch() first")
            layer.check_change(what)

    def check_parameters(self, what: str) -> None:
        """``check_change``, and ValueError if FSDP holds the adapters' Parameters, which can be neither replaced nor
        written then."""
        self.check_change(what)
        merge.check_not_under_fsdp(self, what)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Another adapter on the same base. Those that are active stay so; the new one waits for ``set_adapter``.

        Args:
            adapter_name: its name.
            peft_config: what to adapt, with the method of the adapters that there are; PEFT's own work as well.
            low_cpu_mem_usage: PEFT's; its zeros stand for values that a file brings. Nothing to save here.
            autocast_adapter_dtype: see ``get_peft_model``.

        Raises:
            TypeError, ValueError, NotImplementedError: as ``get_peft_model``; the name is taken, the method is another, adapters
                are merged, or two adapters would train one bias. The model is then as it was.
        """
        self.add_loaded(adapter_name, peft_config, lambda: None, autocast_adapter_dtype)

    def add_loaded(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        fill: Callable[[], None],
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """``add_adapter``, and ``fill`` after it: the adapter stays only if that goes well."""
        from .entry import plan

        config = self._check_addition(adapter_name, peft_config)
        base, active = self.get_base_model(), self.active_adapters
        injection = plan(base, config, adapter_name, autocast_adapter_dtype, None, active)
        try:
            injection.apply()
            self._configs[adapter_name] = injection.config
            fill()
        except BaseException:
            self._configs.pop(adapter_name, None)
            injection.undo()
            raise

    def _check_addition(self, adapter_name: str, peft_config: Any) -> PeftConfig:
        from .entry import own_config

        config = own_config(peft_config)
        self.check_parameters("add_adapter")
        if adapter_name in self._configs:
            raise ValueError(
                f"adapter_name: {adapter_name!r} exists already; delete_adapter it first, or choose another name"
            )
        if self._configs and config.peft_type != self.peft_type:
            raise ValueError(
                f"peft_config: is {config.peft_type}, the model's adapters are {self.peft_type}; one model takes one method"
            )
        every = [config, *self._configs.values()] if self._configs else []
        if any(getattr(other, "bias", "none") != "none" for other in every):
            raise ValueError(
                "peft_config: bias other than 'none' trains biases of the base itself, which only one adapter can; use "
                "bias='none'"
            )
        return config

    def set_adapter(self, adapter_name: str | Iterable[str], inference_mode: bool = False) -> None:
        """Make ``adapter_name`` the active adapter, trainable unless ``inference_mode``; several are stacked: their
        updates are added.

        Raises:
            ValueError: there is no such adapter, or none given; adapters are merged; or two of them trained their own copy
                of a module whole. The model is then as it was.
        """
        from .inject import set_trainable

        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if not names:
            raise ValueError(
                "adapter_name: got none; disable_adapter_layers() makes the model act as its base"
            )
        for name in names:
            self._check_known(name)
        self.check_change("set_adapter")
        for layer in self.adapter_layers():
            layer.check_active(names)
        base = self.get_base_model()
        set_trainable(base, self._configs[names[0]], names, not inference_mode)
        self._active = names

    def set_requires_grad(
        self, adapter_names: str | Iterable[str], requires_grad: bool = True
    ) -> None:
        """Let adapters train, or not; which act stays as it is.

        Raises:
            ValueError: there is no such adapter. Nothing is changed then.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check_known(name)
        for layer in self.adapter_layers():
            for name in names:
                for parameter in layer.adapter_parameters(name):
                    parameter.requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter. If it alone was active, the first that is left becomes active, with a warning as in PEFT;
        without any left the model acts as its base.

        Raises:
            ValueError: there is no such adapter, or adapters are merged.
        """
        self._check_known(adapter_name)
        self.check_parameters("delete_adapter")
        left = [name for name in self._configs if name != adapter_name]
        active = [name for name in self._active if name != adapter_name] or left[:1]
        if left and active[0] not in self._active:
            warnings.warn(
                f"adapter {adapter_name!r} was active and is deleted; {active[0]!r} is active now",
                stacklevel=2,
            )
        trained = any(map(self._trains, self._active))
        for layer in self.adapter_layers():
            layer.delete_adapter(adapter_name)
        del self._configs[adapter_name]
        if active:
            self.set_adapter(active, inference_mode=not trained)
        self._active = active

    def _trains(self, adapter_name: str) -> bool:
        return any(
            parameter.requires_grad
            for layer in self.adapter_layers()
            for parameter in layer.adapter_parameters(adapter_name)
        )

    def rename_adapter(self, adapter_name: str, new_name: str) -> None:
        """Give an adapter another name; which are active and trained stays.

        Raises:
            ValueError: there is no such adapter, the new name is taken or no name, or adapters are merged. The model is then
                as it was.
        """
        self._check_known(adapter_name)
        self.check_parameters("rename_adapter")
        if check_adapter_name(new_name) in self._configs:
            raise ValueError(f"new_name: adapter {new_name!r} exists already; choose another name")
        for layer in self.adapter_layers():
            layer.rename_adapter(adapter_name, new_name)
        renamed = {adapter_name: new_name}
        self._configs = {renamed.get(name, name): value for name, value in self._configs.items()}
        self._active = [renamed.get(name, name) for name in self._active]

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "cat",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
    ) -> None:
        """A new LoRA adapter whose update is sum_i weights_i D_i of the ``adapters``' updates D_i = s_i B_i A_i, or close to it.

        The new one has scaling 1 and waits for ``set_adapter``. PEFT's names and semantics; what differs: "cat", which is
        exact, is the default; a name that is taken is an error; adapters with rsLoRA combine exactly as well; layers that
        only some of the adapters have take the sum of those.

        Args:
            adapters, weights: which, and how strongly; weights may be negative. A single adapter is copied exactly.
            adapter_name: the new one's name.
            combination_type: "cat" (exact, of rank sum r_i), "svd" (closest of ``svd_rank``, from the factors alone),
                "linear" (adds the factors: has cross terms), "ties", "dare_ties", "dare_linear", "magnitude_prune" (of
                the factors, pruned), or one of these four with "_svd" (of the updates, pruned; each is made, a layer at a time).
            svd_rank: None: the largest of the adapters'.
            svd_clamp: quantile that the values of SVD's factors are clamped to.
            svd_full_matrices, svd_driver: PEFT's; the result does not depend on them here.
            density: share of the values that pruning keeps, above 0 up to 1.
            majority_sign_method: "total" or "frequency", for TIES.

        Raises:
            ValueError: an argument is out of range, an adapter is not there, trained modules whole, or its update is not a
                product of two factors (DoRA, lora_bias). The model is then as it was.
        """
        from .combine import add_weighted_adapter

        add_weighted_adapter(
            self,
            adapters,
            weights,
            adapter_name,
            combination_type,
            svd_rank,
            svd_clamp,
            density,
            majority_sign_method,
        )

    @contextmanager
    def mixed_batch(self, adapter_names: Sequence[str], repeats: int = 1) -> Iterator[None]:
        """Within ``with model.mixed_batch(["a", "b", "__base__"]):`` item i of every batch uses the adapter adapter_names[i],
        in inference and in training; backward of a checkpointed model belongs inside too.

        The rows of one adapter are multiplied together, by ``fastlora.lora_linear_segments``: a batch whose items are
        sorted by adapter, those of the base last, needs no copy of any input or output. Which adapters are active does
        not matter; those that are trained must require grad (``set_adapter`` several).

        Args:
            adapter_names: one name an item of the batch; "__base__" for none.
            repeats: rows for each item, next to one another (beams).

        Raises:
            ValueError: an adapter does not exist, or is more than A and B at linears and embeddings; adapters are merged; or
                they train with different dropouts.
        """
        batch = self._mixed(list(adapter_names), repeats)
        before = [(layer, layer.mixed) for layer in self.adapter_layers()]
        for layer, _ in before:
            layer.mixed = batch
        try:
            yield
        finally:
            for layer, outer in before:
                layer.mixed = outer

    def _mixed(self, names: list[str], repeats: int) -> MixedBatch:
        if not names:
            raise ValueError("adapter_names: got none; accepted is a name for each item of a batch")
        batch = MixedBatch(names, repeats)
        for name in batch.adapters:
            self._check_known(name)
        for layer in self.adapter_layers():
            layer.check_change("adapter_names")
        for place, layer in self.get_base_model().named_modules():
            if not isinstance(layer, AdapterLayer):
                continue
            here = [name for name in batch.adapters if name in layer.adapters]
            if here and (problem := _unmixable(layer, here)):
                raise ValueError(f"adapter_names: module {place!r} {problem}")
        return batch

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Let a LoRA adapter act ``scale`` times as strongly as its ``lora_alpha`` says, in every layer.

        Raises:
            ValueError: there is no such adapter, it is not LoRA, adapters are merged, or ``scale`` is not finite.
        """
        self._check_known(adapter_name)
        self.check_change("set_scale")
        if self.peft_type != LoraConfig.peft_type:
            raise ValueError(
                f"adapter_name: {adapter_name!r} is {self.peft_type}, which has no scaling; accepted are LoRA adapters"
            )
        for layer in self.adapter_layers():
            if isinstance(layer, LoRALayer) and adapter_name in layer.r:
                layer.set_scale(adapter_name, scale)

    def enable_adapter_layers(self) -> None:
        """Let the adapters act again.

        Raises:
            ValueError: adapters were merged, and the weights were sharded since; so for ``disable_adapter_layers``.
        """
        merge.check_exchange(self, True)
        for module in self.adapter_layers():
            module.enable_adapters(True)

    def disable_adapter_layers(self) -> None:
        """Make the model act as its base."""
        merge.check_exchange(self, False)
        for module in self.adapter_layers():
            module.enable_adapters(False)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model's outputs within ``with model.disable_adapter():``."""
        before = [(module, module.adapters_enabled) for module in self.adapter_layers()]
        self.disable_adapter_layers()
        try:
            yield
        finally:
            for module, enabled in before:
                module.enable_adapters(enabled)

    # Merging.

    def merge_report(self, dequantize: bool | torch.dtype = False) -> list[MergeReport]:
        """What merging would cost, layer by layer; nothing is changed. See ``merge_adapter`` and ``merge_and_unload``."""
        return merge.report(self.get_base_model(), dequantize)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = True
    ) -> list[MergeReport]:
        """Put the active adapter into the base weights, W + s B A summed in fp32; ``unmerge_adapter`` takes it out again.

        A 4-bit weight is quantised again in blocks of the same sizes. That changes what the model computes, and may cost
        more than the adapter is worth: the report says by how much, and a warning where it takes more than a tenth of
        an update. The originals are kept beside the new weights, and disabling the adapter brings them back as well.
        While merged nothing trains. The state_dict then holds the merged weights and the adapter: loaded into a model
        that is not merged, the adapter would count twice. ``unmerge_adapter`` before a checkpoint is written.

        Args:
            adapter_names: PEFT's; None or the active adapter.
            safe_merge: PEFT's; either way a sum that is not finite is refused.

        Returns:
            A ``MergeReport(name, error, update)`` for each merged layer.

        Raises:
            ValueError: merged already, no adapter acts, ``adapter_names`` are others, or a weight that cannot be merged
                (sharded, FP4, NaN in an adapter).
            NotImplementedError: a layer whose base is not fastlora's to write (bitsandbytes', hooked ones). The model is then
                as it was.
        """
        self._check_active(adapter_names)
        self.check_change("merge_adapter")
        merge.check_not_sharded(self)
        return merge.merge(self.get_base_model())

    def unmerge_adapter(self) -> None:
        """The base weights from before ``merge_adapter``, bit for bit, and the adapter beside them.

        Raises:
            ValueError: the weights were sharded since (``fully_shard``); the model is then as it was.
        """
        merge.unmerge(self)

    def merge_and_unload(
        self,
        dequantize: bool | torch.dtype = False,
        *,
        progressbar: bool = False,
        safe_merge: bool = True,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """The base model with the active adapter in its weights and none of fastlora's adapter layers left.

        All weights are made before the first is replaced, so that for a moment there are two of each. It warns as
        ``merge_adapter`` does. Biases and ``modules_to_save`` come out as they were trained.

        Args:
            dequantize: every 4-bit linear becomes an nn.Linear of this dtype, which transformers saves and any engine
                reads. True: of the dtype that most of the model's other parameters have. False: it stays a
                ``QLoRALinear``, quantised again; what transformers' ``save_pretrained`` writes of that, nothing reads.
            progressbar: PEFT's; there is none.
            safe_merge, adapter_names: see ``merge_adapter``.

        Raises:
            ValueError, NotImplementedError: as ``merge_adapter``; the model is then as it was.
        """
        self._check_active(adapter_names)
        base = self.get_base_model()
        merge.unload(base, dequantize)
        return base

    def unload(self) -> nn.Module:
        """The base model as it computes without adapters, and none of fastlora's adapter layers or hooks left in it.

        As in PEFT ``modules_to_save`` and trained biases stay as they were trained. A base in 4 bits stays that.

        Raises:
            ValueError: adapters are merged, or FSDP holds their Parameters; the model is then as it was.
        """
        self.check_parameters("unload")
        base = self.get_base_model()
        merge.unload_unmerged(base)
        return base

    def _check_active(self, adapter_names: list[str] | None) -> None:
        if adapter_names is not None and list(adapter_names) != self.active_adapters:
            raise ValueError(
                f"adapter_names: got {adapter_names!r}; accepted is None or the active {self.active_adapters}. "
                "set_adapter makes another active"
            )


def _unmixable(layer: AdapterLayer, names: list[str]) -> str | None:
    """Why ``names`` cannot be in one batch at ``layer``."""
    if not isinstance(layer, LoRALayer) or not (
        layer.is_linear or isinstance(layer, LoRAEmbedding)
    ):
        return f"is a {type(layer).__name__}, which acts on a batch as a whole"
    if any(name in layer.lora_magnitude_vector or name in layer.lora_bias for name in names):
        return f"has DoRA or lora_bias in one of {names}, which mixed batches do not have"
    if layer.training and len({layer.lora_dropout[name] for name in names}) > 1:
        return f"has different dropouts in {names}; accepted is one, or eval()"
    return None
