"""What `meansparse demo` runs on: a tiny network, a robust checkpoint of it, a tiny data set."""

from __future__ import annotations

from lightning_meansparse.demo.network import ConvNet

__all__ = ["ConvNet"]
