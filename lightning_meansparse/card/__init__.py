"""Model cards for the Hub, written from an adapter and the records of a sweep, never by hand.

`writing` is the page, `evidence` whether the records are about this adapter, `metadata` what the
Hub reads of it. Cards read files and adapters, never a model.
"""

from lightning_meansparse.card.writing import model_card

__all__ = ["model_card"]
