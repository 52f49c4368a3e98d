"""Another commit of this checkout, in a folder of its own for as long as it is needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resolve(root: Path, base: str) -> str:
    """The full hash of `base`, a commit, branch or tag of the checkout at `root`.

    Raises:
        ValueError: `root` is not the top of a git checkout, git is missing, or it does not know `base`.
    """
    if shutil.which("git") is None:
        raise ValueError("git is not installed, and comparing with another commit needs it")
    top = _git(root, "rev-parse", "--show-toplevel")
    if top.returncode or Path(top.stdout.strip()).resolve() != root.resolve():
        raise ValueError(f"{root} is not a git checkout; clone the repository to compare with another commit")
    found = _git(root, "rev-parse", "--verify", "--quiet", f"{base}^{{commit}}") if not base.startswith("-") else None
    if found is None or found.returncode:
        raise ValueError(f"BASE is {base!r}, which is no commit here; see git log, or git fetch it first")
    return found.stdout.strip()


@contextmanager
def worktree(root: Path, commit: str) -> Iterator[Path]:
    """A folder with the files of `commit` and the bench of `root`, removed at the end whatever happens; the checkout at
    `root` stays as it is.

    Raises:
        OSError: git cannot make it.
    """
    with tempfile.TemporaryDirectory(prefix="attnctl-base-") as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            # The user's hooks run on what the user checks out.
            made = _git(root, "-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", str(tree), commit)
            if made.returncode:
                raise OSError(f"git worktree add failed: {made.stderr.strip()}")
            # What is timed comes from the tree at `root`.
            shutil.rmtree(tree / "bench", ignore_errors=True)
            (tree / "bench").symlink_to(root / "bench")
            yield tree
        finally:
            # Pruning alone would forget the user's worktrees on drives that are away, too.
            if _git(root, "worktree", "remove", "--force", str(tree)).returncode:
                shutil.rmtree(tree, ignore_errors=True)
                _git(root, "worktree", "prune")


@contextmanager
def termination_raised() -> Iterator[None]:
    """A SIGTERM leaves by an exception, so that what was made is removed.

    Raises:
        SystemExit: with the status that shells give to a process so ended.
    """

    def leave(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _git(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Within a git hook these name the repository that the hook runs in.
    hooked = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    env = {name: value for name, value in os.environ.items() if name not in hooked}
    # A Ctrl-C is ours to handle: git would leave half a worktree.
    return subprocess.run(["git", *words], cwd=root, env=env, capture_output=True, text=True, start_new_session=True)
