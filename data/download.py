"""The published FineWeb token shards and their tokenizer, from the Hugging Face Hub.

    python data/download.py --variant sp1024 --train-shards 10     # data/datasets/fineweb10B_sp1024, data/tokenizers
    python data/download.py --variant sp8192 --train-shards 80

The hub's manifest says which variants there are and how many shards each has; validation is always whole, training is
the first shards of one fixed order. Every file is checked (size, the hub's checksum, the shard's header), here and on
each later run: what is complete stays, what was cut short or damaged is fetched again. HF_ENDPOINT is respected.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shards
from shards import DataError, Progress

# The field's own names for another repository of the same layout.
REPO = os.environ.get("MATCHED_FINEWEB_REPO_ID", "willdepueoai/parameter-golf")
ROOT = os.environ.get("MATCHED_FINEWEB_REMOTE_ROOT_PREFIX", "datasets")
PREFIX = "fineweb10B_"
PATHS_PER_QUESTION = 100


# ==== HUB ====================================================================
# Gives: file sizes and checksums, and files, of one repository; every failure as one clear line.


@dataclass(frozen=True)
class RemoteFile:
    """A file of the repository and where it goes. Large files have a sha256, small ones git's blob id."""

    path: str
    target: Path
    size: int
    sha256: str | None
    blob_id: str

    def check(self, path: Path) -> str:
        """What is wrong with a local copy, nothing if it is the file."""
        if not path.is_file():
            return "it is missing"
        if path.stat().st_size != self.size:
            return f"it has {path.stat().st_size} bytes, the hub says {self.size}"
        if self.sha256 is not None:
            same = shards.sha256_file(path) == self.sha256
        else:
            content = path.read_bytes()
            same = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == self.blob_id
        return "" if same else "its checksum is not the hub's"


class Hub:
    """One dataset repository on the hub, through huggingface_hub; its cache is a work folder of ours."""

    def __init__(self, repo: str, root: str, revision: str, work: Path) -> None:
        try:
            import huggingface_hub
            import huggingface_hub.constants
            import huggingface_hub.errors
            import huggingface_hub.utils
        except ImportError as error:
            raise DataError("downloading needs huggingface_hub: pip install huggingface_hub") from error
        huggingface_hub.utils.disable_progress_bars()
        self.repo, self.root, self.revision, self.work = repo, root, revision, work
        self.library: Any = huggingface_hub

    def full(self, path: str) -> str:
        return f"{self.root}/{path}" if self.root else path

    def fetch(self, path: str) -> Path:
        """Download a file into the work folder. An interrupted download continues where it stopped."""
        with self._clear_errors(path):
            found = self.library.hf_hub_download(
                self.repo,
                self.full(path),
                repo_type="dataset",
                revision=self.revision,
                local_dir=self.work,
            )
        return Path(found)

    def describe(self, targets: dict[str, Path]) -> list[RemoteFile]:
        """Sizes and checksums of files, in the order asked. A file that the hub lacks is an error."""
        paths = list(targets)
        known: dict[str, Any] = {}
        for start in range(0, len(paths), PATHS_PER_QUESTION):
            asked = [self.full(path) for path in paths[start : start + PATHS_PER_QUESTION]]
            with self._clear_errors(asked[0]):
                answer = self.library.HfApi().get_paths_info(
                    self.repo, asked, repo_type="dataset", revision=self.revision
                )
            known |= {file.path: file for file in answer}
        missing = [path for path in paths if self.full(path) not in known]
        if missing:
            raise DataError(
                f"{self.repo} lacks {self.full(missing[0])} and {len(missing) - 1} more that its manifest names"
            )
        return [self._remote_file(path, targets[path], known[self.full(path)]) for path in paths]

    def _remote_file(self, path: str, target: Path, file: Any) -> RemoteFile:
        return RemoteFile(path, target, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)

    @contextmanager
    def _clear_errors(self, path: str) -> Iterator[None]:
        errors = self.library.errors
        server = self.library.constants.ENDPOINT
        try:
            yield
        except errors.LocalEntryNotFoundError as error:
            raise DataError(
                f"cannot reach {server}: check the network, unset HF_HUB_OFFLINE, or set HF_ENDPOINT to a mirror"
            ) from error
        except errors.EntryNotFoundError as error:
            raise DataError(f"{self.repo} on {server} has no {path}: check --repo, --root and --revision") from error
        except errors.RepositoryNotFoundError as error:
            raise DataError(f"{server} has no dataset {self.repo}, or it needs a token: check --repo") from error
        except errors.HfHubHTTPError as error:
            raise DataError(
                f"{server} refused {path}: {str(error).strip().splitlines()[0]}; try again later"
            ) from error
        except (errors.HTTPError, OSError) as error:  # the base of what the HTTP library below raises, in each version
            raise DataError(f"fetching {path} from {server} failed ({error}): check the network, run again") from error


# ==== CATALOGUE ==============================================================
# Gives: what the hub's manifest says of a variant.


@dataclass(frozen=True)
class Variant:
    """A published tokenization: its folder, its shard counts, its tokenizer's entry in the hub's manifest."""

    folder: str
    train_shards: int
    val_shards: int
    tokenizer: dict[str, Any]

    def shard_paths(self, train_numbers: list[int]) -> list[str]:
        names = [shards.shard_name("val", number) for number in range(self.val_shards)]
        names += [shards.shard_name("train", number) for number in train_numbers]
        return [f"datasets/{self.folder}/{name}" for name in names]

    def tokenizer_paths(self) -> list[str]:
        """The model first; sentencepiece's .vocab beside it is for people to read."""
        found = [self.tokenizer.get(key) for key in ("model_path", "path", "vocab_path")]
        return [str(path) for path in found if path]


def find_variant(catalogue: dict[str, Any], name: str, repo: str) -> Variant:
    datasets = {str(entry.get("name")): entry for entry in catalogue.get("datasets", [])}
    entry = datasets.get(PREFIX + name)
    if entry is None:
        known = ", ".join(sorted(folder.removeprefix(PREFIX) for folder in datasets)) or "none"
        raise DataError(f"{repo} has no variant {name!r}: known are {known}")
    tokenizers = {tokenizer.get("name"): tokenizer for tokenizer in catalogue.get("tokenizers", [])}
    tokenizer, stats = tokenizers.get(entry.get("tokenizer_name")), entry.get("stats") or {}
    if tokenizer is None or not {"files_train", "files_val"} <= stats.keys():
        raise DataError(
            f"the manifest of {repo} gives no tokenizer or shard counts for {name!r}: check --repo and --root"
        )
    return Variant(PREFIX + name, int(stats["files_train"]), int(stats["files_val"]), tokenizer)


# ==== DOWNLOAD ===============================================================
# Gives: verified files in place, and our own manifest over them.


def local_target(out: Path, path: str) -> Path:
    """datasets/… and tokenizers/… lie here as they do on the hub. A hostile manifest cannot lead elsewhere."""
    target = (out / path).resolve()
    if not target.is_relative_to(out.resolve()) or path.split("/")[0] not in ("datasets", "tokenizers"):
        raise DataError(f"the hub's manifest names {path}, expected a file in datasets/ or tokenizers/: check --repo")
    return target


def find_missing(files: list[RemoteFile]) -> list[RemoteFile]:
    """The files that are not here yet, or not whole."""
    progress, done, missing = Progress("verify", sum(file.size for file in files)), 0, []
    for file in files:
        problem = file.check(file.target)
        if problem:
            missing.append(file)
        if problem and file.target.is_file():
            print(f"{shards.shown(file.target)} is fetched again: {problem}")
        done += file.size
        progress.update(done)
    return missing


def check_space(out: Path, missing: list[RemoteFile]) -> None:
    need = sum(file.size for file in missing)
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if need > free:
        raise DataError(
            f"{need / 1e9:.1f} GB are to be fetched, {out} has {free / 1e9:.1f} GB free: free some space, use fewer "
            "--train-shards or another --out"
        )


def download(hub: Hub, missing: list[RemoteFile]) -> None:
    progress, done = Progress("download", sum(file.size for file in missing), every=0.0), 0
    for file in missing:
        place(file, hub.fetch)
        done += file.size
        progress.update(done, file.target.name)


def place(file: RemoteFile, fetch: Callable[[str], Path]) -> None:
    """Fetch a file, check it, move it into place; once more from the start if it came damaged."""
    problem = ""
    for _ in range(2):
        found = fetch(file.path)
        problem = file.check(found)
        if not problem:
            file.target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(found, file.target)
            return
        found.unlink()  # else the next fetch would return it as already downloaded
    raise DataError(f"{file.path} came damaged twice, {problem}: try again later, or check HF_ENDPOINT")


def describe_tokenizer(path: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """The manifest's tokenizer entry. Whether a sentencepiece model is lossless is seen by trying it."""
    if path.suffix == ".model":
        return shards.load_tokenizer(path).describe()
    return {
        "kind": "byte",
        "file": path.name,
        "sha256": shards.sha256_file(path),
        "vocab_size": int(entry.get("vocab_size", 260)),
        "lossless": True,
    }


def describe_split(files: list[RemoteFile], bos_id: int) -> dict[str, Any]:
    """What can be known of a split without its texts: their bytes cannot, so they are null."""
    entries: list[dict[str, Any]] = []
    documents = 0
    for file in files:
        tokens = shards.read_shard(file.target)
        documents += int(np.count_nonzero(tokens == bos_id))
        checksum = file.sha256 or shards.sha256_file(file.target)
        entries.append({"file": file.target.name, "tokens": len(tokens), "sha256": checksum})
    total = sum(int(entry["tokens"]) for entry in entries)
    return {"documents": documents, "tokens": total, "bytes": None, "shards": entries}


def fingerprint_shards(splits: dict[str, Any]) -> str:
    """The identity of shards whose texts are not here: sha256 over the checksums of the shards in order."""
    lines = [f"{shard['file']} {shard['sha256']}\n" for split in shards.SPLITS for shard in splits[split]["shards"]]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(args: argparse.Namespace, variant: Variant, model: RemoteFile, files: list[RemoteFile]) -> None:
    """Our own manifest over what is here now, so that a run can name its data."""
    folder = args.out / "datasets" / variant.folder
    bos_id = int(variant.tokenizer.get("bos_id", 1))
    splits = {
        split: describe_split([file for file in files if file.target.name.startswith(f"fineweb_{split}_")], bos_id)
        for split in shards.SPLITS
    }
    manifest = {
        "format": 1,
        "name": PREFIX.rstrip("_"),
        "fingerprint": fingerprint_shards(splits),
        "bos_id": bos_id,
        "tokenizer": describe_tokenizer(model.target, variant.tokenizer),
        "splits": splits,
        "val_13gram_overlap": None,
        "source": {"tool": "download", "repo": args.repo, "revision": args.revision, "fingerprint_of": "shards"},
    }
    shards.write_json(folder / shards.MANIFEST, manifest)
    shards.print_summary(folder, manifest, args.out)


# ==== COMMAND LINE ===========================================================


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Published FineWeb token shards and tokenizers.")
    add = parser.add_argument
    add("--variant", default="sp1024", help="tokenization: sp1024, sp8192, byte260, ...; an unknown one lists them")
    add("--train-shards", type=int, default=10, help="training shards of 100,000,000 tokens (200 MB) each")
    add("--out", type=Path, default=shards.DATA_FOLDER, help="where datasets/ and tokenizers/ are")
    add("--repo", default=REPO, help="dataset repository (or MATCHED_FINEWEB_REPO_ID)")
    add("--root", default=ROOT, help="folder in the repository (or MATCHED_FINEWEB_REMOTE_ROOT_PREFIX)")
    add("--revision", default="main", help="branch, tag or commit of the repository")
    return parser


def choose_shards(variant: Variant, args: argparse.Namespace) -> list[int]:
    """Which training shards to have: those asked for, and those that are here already."""
    if not 0 <= args.train_shards <= variant.train_shards:
        raise DataError(
            f"--train-shards {args.train_shards} is not in [0, {variant.train_shards}]: {args.variant} has "
            f"{variant.train_shards} on {args.repo}"
        )
    folder = args.out / "datasets" / variant.folder
    more = range(args.train_shards, variant.train_shards)
    kept = [number for number in more if (folder / shards.shard_name("train", number)).is_file()]
    if kept:
        print(f"{len(kept)} training shards beyond the first {args.train_shards} are here: they are kept and verified")
    return [*range(args.train_shards), *kept]


def run(args: argparse.Namespace) -> None:
    hub = Hub(args.repo, args.root, args.revision, args.out / "work" / "hub")
    catalogue_file = hub.fetch("manifest.json")
    variant = find_variant(shards.read_json(catalogue_file) or {}, args.variant, args.repo)
    models, numbered = variant.tokenizer_paths(), variant.shard_paths(choose_shards(variant, args))
    files = hub.describe({path: local_target(args.out, path) for path in models + numbered})
    missing = find_missing(files)
    check_space(args.out, missing)
    download(hub, missing)
    os.replace(catalogue_file, args.out / "manifest.json")  # where the field's own scripts look for it
    write_manifest(args, variant, files[0], files[len(models) :])
    shutil.rmtree(hub.work)


def main(arguments: list[str] | None = None) -> None:
    run(build_parser().parse_args(arguments))


if __name__ == "__main__":
    shards.run_tool(main)
