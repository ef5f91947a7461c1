"""References as the passes of a generation's steps are given them.

Shape letters: B prompts times videos per prompt, C latent channels, M references, h and w their latents' height and
width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..branch.reference_cache import ReferenceCache


@dataclass(frozen=True)
class EncodedReferences:
    """References as `ReferenceBranch.references` takes them.

    Attributes:
        given: (B, C, M, h, w) latents (joint attention), or keys and values (isolated) of B samples or of one that
            stands for all.
        mask: (B, M) bool, True where one of the latents' references is real; None: all are.
    """

    given: Tensor | ReferenceCache
    mask: Tensor | None = None

    def for_videos(self, videos: int) -> EncodedReferences:
        """Every sample `videos` times, one after the other."""
        if isinstance(self.given, ReferenceCache):
            return replace(self, given=self.given.repeat_interleave(videos) if len(self.given) > 1 else self.given)
        mask = None if self.mask is None else self.mask.repeat_interleave(videos, 0)
        return EncodedReferences(self.given.repeat_interleave(videos, 0), mask)

    def for_passes(self, passes: int) -> EncodedReferences:
        """All samples `passes` times over."""
        if passes == 1:
            return self
        if isinstance(self.given, ReferenceCache):
            return replace(self, given=self.given.repeat(passes) if len(self.given) > 1 else self.given)
        mask = None if self.mask is None else self.mask.repeat(passes, 1)
        return EncodedReferences(self.given.repeat(passes, 1, 1, 1, 1), mask)
