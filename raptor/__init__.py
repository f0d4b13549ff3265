"""Block-recurrent dynamics in vision transformers: find the phases of a ViT and replace each by one recurrent block."""
__version__ = "0.1.0"

import lazy_loader as _lazy

# The public names stand in `__init__.pyi`, where type checkers read them too; each is imported when it is first used.
_load, _names, __all__ = _lazy.attach_stub(__name__, __file__)


def __getattr__(name):
    from raptor.core import document
    return document(_load(name))


def __dir__():
    return [*_names(), "__version__"]
