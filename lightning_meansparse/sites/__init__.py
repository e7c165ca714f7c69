"""Where operators belong in a model: `Site` and `find_sites`."""

from lightning_meansparse.sites.find import (
    UndecidedChannelsError,
    UnreachableSitesError,
    find_sites,
)
from lightning_meansparse.sites.record import Site

__all__ = ["Site", "UndecidedChannelsError", "UnreachableSitesError", "find_sites"]
