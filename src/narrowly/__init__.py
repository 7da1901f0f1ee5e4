"""Control what a fine-tune teaches: find, explain and ablate the concepts it drags along.

The public names stand in `__init__.pyi`. Nothing heavy is imported until one is used: `import
narrowly` loads no torch.
"""

from importlib.metadata import version

import lazy_loader

__version__ = version("narrowly")
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
