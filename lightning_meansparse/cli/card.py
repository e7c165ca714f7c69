"""`meansparse card`: a model card from an adapter and, if there are any, its records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_meansparse.cli.words import Words

_SIGNED = "This card was written by `lightning_meansparse`"


def run(args: Sequence[str]) -> None:
    """Write README.md beside the adapter."""
    words = Words("card")
    words.add_argument("directory", help="output folder of a sweep, or a folder with an adapter")
    words.add_argument("--repo-id", help="org/name on the Hub, for the lines on how to load it")
    words.add_argument("--records", help="output folder of the sweep that measured the adapter")
    words.add_argument("--license", help="as the Hub names it, such as apache-2.0")
    words.add_argument("--output", help="file to write (default: README.md beside the adapter)")
    given = words.parse_args(args)

    from lightning_meansparse.adapter import read_adapter
    from lightning_meansparse.adapter.files import replace_files
    from lightning_meansparse.card import model_card
    from lightning_meansparse.cli.console import make_console

    folder = Path(given.directory)
    records = given.records
    if (folder / "adapter").is_dir():  # of a sweep
        records, folder = records or folder, folder / "adapter"
    card = model_card(
        read_adapter(folder), repo_id=given.repo_id, records=records, license=given.license
    )
    path = Path(given.output) if given.output else folder / "README.md"
    if not given.output and path.exists() and _SIGNED not in path.read_text(encoding="utf-8"):
        raise FileExistsError(f"{path} was not written by this command; name another by --output")
    replace_files(path.parent, {path.name: card.encode()})
    make_console().print(f"card: {path}", soft_wrap=True)
