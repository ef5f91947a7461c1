"""References as the passes of a generation's steps are given them.

Shape letters: B prompts times videos per prompt, C latent channels, M references, h and w their latents' height and
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..branch.reference_cache import ReferenceCache
from .guidance import Call


@dataclass(frozen=True)
class EncodedReferences:
    """References as `ReferenceBranch.references` takes them.

    Attributes:
        given: (B, C, M, h, w) latents (joint attention), or keys and values (isolated) of B samples or of one that
            stands for all.
        mask: (B, M) bool, True where one of the latents' references is real; None: all are.
        zeros: whether latents of zero ride along with passes without references, in their places; keys and values know
            it themselves.
    """

    given: Tensor | ReferenceCache
    mask: Tensor | None = None
    zeros: bool = False

    @property
    def left_out(self) -> EncodedReferences | None:
        """What a pass without references is given: None, or with `null_reference` "zeros" what stands for them."""
        if isinstance(self.given, ReferenceCache):
            return None if self.given.null is None else replace(self, given=self.given.null)
        return replace(self, given=torch.zeros_like(self.given)) if self.zeros else None

    def for_videos(self, videos: int) -> EncodedReferences:
        """Every sample `videos` times, one after the other."""
        if isinstance(self.given, ReferenceCache):
            return replace(self, given=self.given.repeat_interleave(videos) if len(self.given) > 1 else self.given)
        mask = None if self.mask is None else self.mask.repeat_interleave(videos, 0)
        return replace(self, given=self.given.repeat_interleave(videos, 0), mask=mask)

    def for_passes(self, passes: int) -> EncodedReferences:
        """All samples `passes` times over."""
        if passes == 1:
            return self
        if isinstance(self.given, ReferenceCache):
            return replace(self, given=self.given.repeat(passes) if len(self.given) > 1 else self.given)
        mask = None if self.mask is None else self.mask.repeat(passes, 1)
        return replace(self, given=self.given.repeat(passes, 1, 1, 1, 1), mask=mask)

    def for_call(self, call: Call) -> EncodedReferences | None:
        """What rides along with a call of the transformer: the references, or what stands for them in passes without;
        None: nothing."""
        shown = self if call[0].references else self.left_out
        return None if shown is None else shown.for_passes(len(call))
