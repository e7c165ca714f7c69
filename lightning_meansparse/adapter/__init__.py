"""The adapter: statistics and α of every site in two small files, for anyone with the same base."""

from lightning_meansparse.adapter.base import base_module
from lightning_meansparse.adapter.files import read_adapter
from lightning_meansparse.adapter.format import Adapter
from lightning_meansparse.adapter.models import load_adapter, save_adapter
from lightning_meansparse.adapter.published import base_repository, is_public, load_published

__all__ = [
    "Adapter",
    "base_module",
    "base_repository",
    "is_public",
    "load_adapter",
    "load_published",
    "read_adapter",
    "save_adapter",
]
