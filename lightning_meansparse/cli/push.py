"""`meansparse push`: an adapter onto the Hugging Face Hub, with a model card."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_meansparse.cli.words import Words


def run(args: Sequence[str]) -> None:
    """Push the adapter given, and say how to load it."""
    words = Words("push")
    words.add_argument(
        "adapter", help="a folder or Lightning checkpoint; or a sweep's output folder"
    )
    words.add_argument("repo_id", help="organisation/name on the Hub; made if there is none")
    words.add_argument("--base", help="where others find the base, such as timm/hf-hub:org/name")
    words.add_argument("--records", help="output folder of a sweep: results for the card")
    words.add_argument("--license", help="as the Hub names it, such as apache-2.0")
    words.add_argument("--revision", help="branch; made if there is none")
    words.add_argument("--message", default="Upload MeanSparse adapter", help="title of the commit")
    words.add_argument("--private", action="store_true", help="a new repository is private")
    given = words.parse_args(args)

    from lightning_meansparse.cli.console import make_console
    from lightning_meansparse.hub import push_adapter

    adapter, records = Path(given.adapter), given.records
    if (adapter / "adapter").is_dir():  # of a sweep
        adapter, records = adapter / "adapter", records or adapter
    commit = push_adapter(
        adapter,
        given.repo_id,
        base=given.base,
        records=records,
        license=given.license,
        revision=given.revision,
        commit_message=given.message,
        private=True if given.private else None,
    )
    console = make_console()
    console.print(f"pushed: {given.repo_id} at commit {commit}", soft_wrap=True)
    console.print(f'load_classifier("meansparse/{given.repo_id}")', soft_wrap=True, markup=False)
