"""The adapter: statistics and α of every site in two small files, for anyone with the same base."""

from lightning_meansparse.adapter.base import base_module
from lightning_meansparse.adapter.files import load_adapter, read_adapter, save_adapter
from lightning_meansparse.adapter.format import Adapter

__all__ = ["Adapter", "base_module", "load_adapter", "read_adapter", "save_adapter"]
