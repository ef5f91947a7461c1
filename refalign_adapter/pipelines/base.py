"""What all reference pipelines have in common: the branch, checks of their inputs, encoded references, unloading.

Shape letters: B prompts, C latent channels, M references (padded to the largest number among the prompts), h and w a
reference's latent height and width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..branch.reference_branch import branches_of
from ..branch.reference_cache import ReferenceCache
from ..errors import ConfigError, UserError, shorten
from ..families.base import Family
from ..media.canvas import reference_size
from ..media.sizes import Size, size_misfits
from .adapters import NamedAdapters
from .attention_backends import DIFFERENT, LEFT_OUT, check_mask
from .conditions import EncodedReferences
from .references import FIELD, Canvases, count_prompts, group_by_prompt, load_canvases
from .step_caches import check_step_cache, prefill_context, reset_step_cache

MAX_REFERENCES = 8


class ReferencePipeline(NamedAdapters):
    """What a pipeline with references does beside its call. `load_adapter` makes it; it shares the given pipeline's
    components.

    Attributes:
        max_references: most references a prompt may have. Each takes the memory and time of one more latent frame; the
            limit is there to catch slips and can be raised.
    """

    max_references: int = MAX_REFERENCES
    vae: Any

    @torch.no_grad()
    def encode_references(
        self, images: Any, height: int = 480, width: int = 832, num_frames: int = 81
    ) -> ReferenceCache:
        """Run references through the transformer once, for any number of `pipe(prompt, reference_cache=...)`.

        Keys and values depend on no prompt, seed, number of steps or scale (isolated attention). They do on the
        adapter, its weight and the base; unless the adapter has a `reference_frame`, on `num_frames`; and with
        `reference_place` "beyond" on `height` and `width`.

        Args:
            images: as `reference_images` of a call. One list of images serves any prompts; a list of such lists as
                many prompts as it has.
            height, width, num_frames: of the videos.

        Returns:
            Keys and values on the transformer's device; they can be moved, saved and loaded, and say their bytes.

        Raises:
            UserError: bad input, in one line per problem, before any model runs; or joint attention, which runs
                references along with the video.
        """
        with self._claimed():
            attention = self._reference_branch().config.attention
            if attention != "isolated":
                raise UserError(
                    f"{FIELD}: attention {attention!r} runs references along with the video and has nothing to keep "
                    "of them; pass them to each call, or train an adapter with attention='isolated'"
                )
            self._check_size(num_frames, height, width)
            references = self._read_references(images, count_prompts(images), height, width)
            if references is None:
                raise UserError(f"{FIELD}: give at least one image to encode")
            self._check_settings(references)
            with self._cleaned_up():
                cache = self._encode_references(references, (num_frames, height, width)).given
        assert isinstance(cache, ReferenceCache)
        return cache

    @property
    def _family(self) -> Family:
        return self._loaded_branch().family

    def _has_branch(self) -> bool:
        return bool(branches_of(self.transformer))

    def _multiples(self) -> tuple[int, int, int]:
        """(t, h, w): frames are k · t + 1, height a multiple of h and width of w, in pixels."""
        branch = self._loaded_branch()
        return branch.family.size_multiples(self, branch.family.patch_size(branch.transformer))

    def _check_size(self, frames: Any, height: Any, width: Any) -> None:
        """Refuse sizes that the model cannot cut into tokens; all at once."""
        given = {"num_frames": frames, "height": height, "width": width}
        if problems := [
            f"{name} must be a whole number, got {shorten(value)}"
            for name, value in given.items()
            if type(value) is not int
        ]:
            raise ConfigError(problems)
        if problems := list(size_misfits(Size(frames, height, width), self._multiples())):
            raise ConfigError(problems)

    def _read_references(self, images: Any, prompts: int, height: int, width: int) -> Canvases | None:
        """Canvases of the size that the adapter takes for a video of height and width; None without any reference."""
        groups = group_by_prompt(images, prompts, self.max_references)
        if groups is None:
            return None
        height, width = self._canvas(height, width)
        _, rows, columns = self._multiples()
        drop = self._reference_branch().config.drop_background
        return load_canvases(groups, height, width, (height // rows, width // columns) if drop else None)

    def _canvas(self, height: int, width: int) -> tuple[int, int]:
        """Height and width in pixels of a reference's canvas for a video of height and width."""
        config = self._reference_branch().config
        return reference_size(height, width, config.reference_scale, self._multiples()[1:], config.reference_size)

    def _read_given(
        self, images: Any, cache: Any, prompts: int, size: tuple[int, int, int]
    ) -> Canvases | ReferenceCache | None:
        """References as a call gives them, images or keys and values, for videos of size (frames, height, width)."""
        if cache is None:
            return self._read_references(images, prompts, *size[1:])
        if images is not None:
            raise UserError(f"{FIELD}: give either {FIELD} or reference_cache, which was made of some")
        return self._check_cache(cache, prompts, size)

    def _check_cache(self, cache: Any, prompts: int, size: tuple[int, int, int]) -> ReferenceCache:
        """Refuse cached references that are for something else."""
        if not isinstance(cache, ReferenceCache):
            raise UserError(
                f"reference_cache: expected what encode_references returns, got {type(cache).__name__}; "
                "ReferenceCache.load(path) reads a saved one"
            )
        branch = self._reference_branch()
        branch.references(cache)  # checks adapter and base
        if cache.null is None and branch.config.null_reference == "zeros":
            raise UserError("reference_cache: made without what passes without references read; encode them again")
        (frames, height, width), (time, rows, columns) = size, self._multiples()
        wanted = (frames - 1) // time + 1
        if cache.frames not in (None, wanted):
            raise UserError(
                f"reference_cache: made for videos of {cache.frames} latent frames, num_frames {frames} gives "
                f"{wanted}; call encode_references(..., num_frames={frames})"
            )
        if cache.grid not in (None, (height // rows, width // columns)):
            made = f"{cache.grid[0] * rows} x {cache.grid[1] * columns}"
            raise UserError(
                f"reference_cache: made for videos of {made} pixels (height x width), this one has {height} x {width};"
                f" call encode_references(..., height={height}, width={width})"
            )
        patch = branch.family.patch_size(branch.transformer)
        canvas = self._canvas(height, width)
        if cache.canvas not in (None, (canvas[0] * patch[1] // rows, canvas[1] * patch[2] // columns)):
            raise UserError(
                f"reference_cache: its references are of another size than those of a video of {height} x {width} "
                f"pixels (height x width); call encode_references(..., height={height}, width={width})"
            )
        if len(cache) not in (1, prompts):
            raise UserError(
                f"reference_cache: made for {len(cache)} prompts, got {prompts}; encode one list of images per "
                "prompt, or a single one for all"
            )
        return cache

    def _check_settings(
        self, references: Canvases | ReferenceCache, attention_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Refuse settings of the transformer with which references would go wrong."""
        branch = self._reference_branch()
        check_step_cache(self.transformer)
        if getattr(self.transformer, "_parallel_config", None) is not None:
            raise UserError(
                "pipe: its transformer shares a video out among devices (enable_parallelism), which references do not "
                "take yet; leave context parallelism off, or references out"
            )
        if branch.config.attention == "isolated" and (attention_kwargs or {}).get("scale", 1) != 1:
            raise UserError(
                "attention_kwargs: 'scale' does not reach references with attention 'isolated', as their keys and "
                "values are made once; weigh adapters with set_adapters(names, weights)"
            )
        if isinstance(references, ReferenceCache):
            leaves_out, differ = False, references.mask is not None
        else:
            leaves_out, differ = references.leaves_out, references.differ
        if leaves_out or differ:
            check_mask(self.transformer, branch.family, DIFFERENT if differ else LEFT_OUT)

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """Have the transformer to this thread: a pass of another one would switch LoRAs in the middle of ours.

        Raises:
            UserError: another thread uses it with references; or no adapter is loaded.
        """
        self._loaded_branch()
        with ExitStack() as claims:
            for branch in branches_of(self.transformer).values():
                claims.enter_context(branch.references(None))
            yield

    @contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        """Let go of what models, step caches and branches keep, come what may."""
        reset_step_cache(self.transformer)
        try:
            yield
        finally:
            for branch in branches_of(self.transformer).values():
                branch.clear()
            self._current_timestep = None
            self.maybe_free_model_hooks()  # type: ignore[attr-defined]  # of diffusers' pipeline

    def _encode_references(
        self, references: Canvases | ReferenceCache, size: tuple[int, int, int]
    ) -> EncodedReferences:
        """What passes are given: latents, or, with isolated attention, keys and values for videos of that size."""
        if isinstance(references, ReferenceCache):
            return EncodedReferences(references)
        branch = self._reference_branch()
        device = self._execution_device  # type: ignore[attr-defined]  # of diffusers' pipeline
        latents = self._encode_canvases(references).to(device, self.transformer.dtype)
        mask = None if references.mask.all() else references.mask.to(device)  # some attention kernels take no mask
        if branch.config.attention == "joint":
            return EncodedReferences(latents, mask, zeros=branch.config.null_reference == "zeros")
        time, rows, columns = self._multiples()
        _, patch_rows, patch_columns = branch.family.patch_size(self.transformer)
        of_video = {
            "frames": (size[0] - 1) // time + 1,
            "size": (size[1] // rows * patch_rows, size[2] // columns * patch_columns),
        }
        # Once per video, compiled blocks would only get further graphs, one for each number of references.
        with prefill_context(self.transformer), torch.compiler.set_stance("force_eager"):
            cache = branch.encode_references(latents, mask, references.tokens, **of_video)
        assert cache is not None, "groups without an image are None before"
        return EncodedReferences(cache)

    def _encode_canvases(self, references: Canvases) -> Tensor:
        """(B, C, M, h, w) normalised latents, zero where padded.

        One image at a time, which bounds memory; the same image is the same latent in any company.
        """
        family = self._loaded_branch().family
        if (hook := getattr(self.vae, "_hf_hook", None)) is not None:
            hook.pre_forward(self.vae)  # offloaded, it comes to its device only when called; families ask where it is
        places = references.mask.nonzero().tolist()
        encoded = [family.encode_images(self, references.pixels[b, m].unsqueeze(0))[0] for b, m in places]
        latents = torch.zeros(*references.mask.shape, *encoded[0].shape, device=encoded[0].device)
        for (b, m), latent in zip(places, encoded, strict=True):
            latents[b, m] = latent
        return latents.transpose(1, 2)
