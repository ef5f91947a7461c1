"""The reference pipeline of a stock class: a subclass, and objects of it with another pipeline's components."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers.loaders.lora_base import LoraBaseMixin

from ..errors import UserError
from .call import DEFAULTS, ReferenceCall
from .saving import save_stock


class Reference(ReferenceCall):
    """Mixed into a diffusers pipeline class, in front of it: what is made at run time is saved and copied as well."""

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Write a folder that stock classes read, as in diffusers; reference adapters go beside the components.

        Raises:
            UserError: see `save_stock`.
        """
        save_stock(self, build_pipeline(self, stock_class(self)), save_directory, *args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (stock_class(self),), dict(vars(self))


_OWN = tuple(inspect.signature(ReferenceCall.__call__).parameters.values())


@functools.cache
def reference_class(stock: type) -> type:
    """A subclass of a stock pipeline class that takes references, the same one every time; of `WanPipeline` it is
    called `WanReferencePipeline`.

    Raises:
        UserError: the class has private names of ours, which would stand in front of its own.
    """
    if issubclass(stock, ReferenceCall):
        return stock
    _check_names(stock)
    name = stock.__name__.removesuffix("Pipeline") + "ReferencePipeline"
    own = {"__call__": _documented(stock), "encode_prompt": _with_signature(stock), "stock": stock}
    bases = (Reference, stock)
    if not issubclass(stock, LoraBaseMixin):  # not every stock pipeline can switch LoRAs by name
        bases, own = (*bases, LoraBaseMixin), {**own, "_lora_loadable_modules": ["transformer"]}
    made = type(name, bases, {"__module__": __name__, **own})
    made.__doc__ = f"`{stock.__name__}` that takes reference images; `load_adapter` makes it from one."
    return made


def _check_names(stock: type) -> None:
    ours = {name for cls in Reference.__mro__[:-1] for name in vars(cls) if _is_private(name)}
    theirs = {name for cls in stock.__mro__[:-1] for name in vars(cls)}
    if clash := sorted(ours & theirs):
        raise UserError(
            f"pipe: {stock.__name__} has {clash[0]} of its own, as reference pipelines do; rename it there"
        )


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and not name.startswith("_abc")


def stock_class(pipe: Any) -> Any:
    """The class of a reference pipeline without the references; that of any other as it is."""
    return getattr(type(pipe), "stock", type(pipe))


def build_pipeline(pipe: Any, cls: type | None = None, **replaced: Any) -> Any:
    """A pipeline with the components and settings of `pipe`; diffusers' `from_pipe` would cast them to float32.

    Args:
        pipe: a diffusers pipeline.
        cls: of the new one; None: the reference class of `pipe`'s.
        replaced: components to take instead of its own.
    """
    components = {**pipe.components, **replaced}
    names = inspect.signature(stock_class(pipe).__init__).parameters
    settings = {name: pipe.config[name] for name in names if name in pipe.config and name not in components}
    return (cls or reference_class(type(pipe)))(**components, **settings)


def _documented(stock: Any) -> Any:
    """The call, with a signature and a text that name the stock pipeline's arguments too."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ReferenceCall.__call__(self, *args, **kwargs)

    theirs = [
        parameter.replace(default=DEFAULTS[name]) if name in DEFAULTS else parameter
        for name, parameter in inspect.signature(stock.__call__).parameters.items()
    ]
    first = [parameter for parameter in _OWN if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    only = [parameter for parameter in _OWN if parameter.kind is parameter.KEYWORD_ONLY]
    rest = [parameter for parameter in theirs if parameter.name not in {own.name for own in first}]
    __call__.__signature__ = inspect.Signature([*first, *rest, *only])  # type: ignore[attr-defined]
    __call__.__doc__ = f"{ReferenceCall.__call__.__doc__}\n    Of `{stock.__name__}`:\n{stock.__call__.__doc__ or ''}"
    return __call__


def _with_signature(stock: Any) -> Any:
    """The encoding of prompts under the stock pipeline's signature, by which callers find out what it takes."""

    @functools.wraps(stock.encode_prompt)
    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        return ReferenceCall.encode_prompt(self, *args, **kwargs)

    return encode_prompt


def _revive(stock: type) -> Any:
    """An empty reference pipeline, for copies and pickles."""
    cls = reference_class(stock)
    return object.__new__(cls)
