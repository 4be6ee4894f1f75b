"""Publish a run: one repository a channel, the combined one, the metric, the dataset, and a collection of them all.

    wsdino-push runs/demo --dry_run hub               # write the repository folders, and upload nothing
    wsdino-push runs/bbbc021 --namespace my-lab       # create, upload, collect; repeat it after an interruption

Every repository is compared with what the Hub holds, file by file, and made the same: what differs is uploaded, and
what is gone here is removed there. So a second push changes nothing, and one that was interrupted goes on. A
repository of that name with files that wsdino-push did not put there is refused, unless with --replace. The token is
the one of `hf auth login` or HF_TOKEN.
"""

import argparse
import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError
from tqdm.auto import tqdm

from model_cards import metric_card, model_card

PARTS = ("models", "metric", "dataset")
METRIC = Path(__file__).parent / "evaluation_wsdino" / "not_same_compound"
METRIC_FILES = ("not_same_compound.py", "requirements.txt")
# The page of a static Space; the card beside it says what the metric is.
METRIC_PAGE = (
    '<!doctype html><meta charset="utf-8"><title>Not same compound</title><p>See the README of this Space.</p>\n'
)
TITLE = "Upload with wsdino-push"  # of commits, by which a repository is known as made here
FILES_A_COMMIT = 50  # what an interruption can cost: a dataset has many large files


class PushError(ValueError):
    """A run that cannot be published, or a repository that the Hub refused; the message names it."""


@dataclass
class Repository:
    """A folder that is to be a repository of the Hub."""

    repo_id: str
    kind: str  # "model", "dataset" or "space", in the Hub's words
    folder: Path


def read_json(path: Path, mend: str) -> dict:
    """A JSON object, or a PushError that says what to do without it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PushError(f"{path} is missing: {mend}.") from None
    except ValueError as error:
        raise PushError(f"{path} is not JSON ({error}): {mend}.") from error
    if not isinstance(content, dict):
        raise PushError(f"{path} holds a {type(content).__name__}, not an object: {mend}.")
    return content


def read_results(run: Path) -> dict:
    """A run's results.json with all that the cards show."""
    path, mend = run / "results.json", f"run wsdino-evaluate {run} first, for the cards show measured results alone"
    results = read_json(path, mend)
    sets = results.get("sets")
    whole = {"simulated", "sources", "headline", "counts", "protocol", "comparisons"} <= results.keys()
    if not whole or not isinstance(sets, dict) or not all(isinstance(part, dict) for part in sets.values()):
        raise PushError(f"{path} is not what wsdino-evaluate writes: {mend}.")
    return results


def read_config(folder: Path) -> dict:
    """The config.json of a model with the numbers that its name and card show."""
    path, mend = folder / "config.json", "build the model's repository again"
    config = read_json(path, mend)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size"):
        if not isinstance(config.get(name), int):
            raise PushError(f"{path} has no {name} that is a whole number: {mend}.")
    if not isinstance(config.get("channel_names"), list) or not config["channel_names"]:
        raise PushError(f"{path} names no channel: {mend}.")
    return config


def architecture_name(config: dict) -> str:
    """`vits8` for the ViT-S/8 of the paper; other shapes are spelt out."""
    known = {(192, 12, 3): "vitt", (384, 12, 6): "vits", (768, 12, 12): "vitb"}
    shape = tuple(config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    return known.get(shape, f"vit{shape[0]}x{shape[1]}p") + str(config["patch_size"])


def dataset_names(results: dict) -> tuple[str, str]:
    """What the data are called in repository names and in words."""
    if results["simulated"]:
        return "simulated", "simulated screen"
    source = results["sources"][0] if results["sources"] else "screen"
    if source.lower().startswith("bbbc021"):
        return "bbbc021", "BBBC021v1"
    return re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-"), source


def build_repositories(
    run: Path,
    staging: Path,
    *,
    namespace: str,
    name: str | None = None,
    dataset: str | Path | None = None,
    dataset_on_hub: str | None = None,
    parts: tuple[str, ...] = PARTS,
) -> list[Repository]:
    """Write the folders of a run's repositories under `staging`; a dataset is taken where it lies.

    Parameters
    ----------
    run : Path
        A run folder with `results.json` and the models of its channels.
    staging : Path
        Where the folders are written, one a repository.
    namespace, name : str
        User or organisation, and what the repositories' names begin with (default `wsdino-<network>-<dataset>`).
    dataset : str or Path, optional
        The built dataset's folder; by default the one that the run was trained on.
    dataset_on_hub : str, optional
        The dataset's repository for the cards to name, where the dataset is not published with them.
    parts : tuple of str
        Which of models, metric and dataset.

    Raises
    ------
    PushError
        If the run was not evaluated, lacks a model, or the dataset's folder is none.
    """
    if not run.is_dir():
        raise PushError(f"{run} is not a folder: name a run folder, like runs/demo.")
    results = read_results(run)
    folders = {
        path.parent.name: path for path in sorted(run.glob("*/model")) if (path / "model.safetensors").is_file()
    }
    if not folders:
        raise PushError(f"{run} holds no trained model: finish its training first.")
    first = read_config(next(iter(folders.values())))
    slug, words = dataset_names(results)
    name = name or f"wsdino-{architecture_name(first)}-{slug}"
    repositories = []
    dataset = dataset or ((results.get("settings") or {}).get("dataset") or {}).get("path")
    dataset_id = None
    if "dataset" in parts:
        folder = Path(dataset or "")
        if dataset and folder.is_dir():
            if not (folder / "README.md").is_file():
                raise PushError(f"{folder} is not a built dataset, for it has no README.md: run wsdino-prepare.")
            dataset_id = f"{namespace}/{f'{name}-screen' if results['simulated'] else slug}"
            repositories.append(Repository(dataset_id, "dataset", folder))
        else:
            raise PushError(
                f"the dataset {dataset or 'of the run'} is not a folder here: name it with --dataset, or leave it out "
                "with --parts models metric."
            )
    elif dataset_on_hub:
        dataset_id = dataset_on_hub
    if "metric" in parts:
        repository = Repository(f"{namespace}/not_same_compound", "space", staging / "not_same_compound")
        repository.folder.mkdir(parents=True)
        for file in METRIC_FILES:
            shutil.copyfile(METRIC / file, repository.folder / file)
        (repository.folder / "README.md").write_text(metric_card(repository.repo_id), encoding="utf-8")
        (repository.folder / "index.html").write_text(METRIC_PAGE, encoding="utf-8")
        repositories.append(repository)
    if "models" in parts:
        combined = run / "model"
        if len(folders) > 1 and not (combined / "model.safetensors").is_file():
            raise PushError(f"{combined} is missing, which holds the towers together: finish the run's training.")
        models = {f"{name}-{channel}": folder for channel, folder in folders.items()}
        if len(folders) > 1:
            models[name] = combined
        for model_name, source in models.items():
            repository = Repository(f"{namespace}/{model_name}", "model", staging / model_name)
            shutil.copytree(source, repository.folder, ignore=shutil.ignore_patterns("__pycache__", "*.partial", ".*"))
            card = model_card(
                results,
                read_config(source),
                read_json(source / "preprocessor_config.json", "build the model's repository again"),
                repo_id=repository.repo_id,
                dataset_id=dataset_id,
                dataset_name=words,
            )
            (repository.folder / "README.md").write_text(card, encoding="utf-8")
            repositories.append(repository)
    return repositories


def local_files(folder: Path) -> dict[str, Path]:
    """The files of a repository folder by their path in it; hidden and unfinished ones stay here."""
    files = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") or part in ("__pycache__",) for part in parts):
            if path.suffix != ".partial":
                files["/".join(parts)] = path
    return files


def differs(path: Path, remote) -> bool:
    """Whether a file here is another than that of the Hub, by the checksum that the Hub keeps of it."""
    if path.stat().st_size != remote.size:
        return True
    # a large file is known by its SHA-256, a small one by its git object id
    digest = hashlib.sha256() if remote.lfs else hashlib.sha1(b"blob %d\0" % remote.size)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() != (remote.lfs.sha256 if remote.lfs else remote.blob_id)


def push_repository(api: HfApi, repository: Repository, *, private: bool, replace: bool = False) -> int:
    """Create a repository if need be and make it hold the folder's files and, but for hidden ones, no others.

    Returns how many files changed.

    Raises
    ------
    PushError
        If it is to be private, but exists and is public; if it holds what others put there, unless `replace`.
    """
    kind = repository.kind
    api.create_repo(
        repository.repo_id,
        repo_type=kind,
        private=private,
        exist_ok=True,
        space_sdk="static" if kind == "space" else None,
    )
    if private and api.repo_info(repository.repo_id, repo_type=kind).private is False:  # it was there before
        raise PushError("it is public: make it private in its settings, or leave out --private")
    tree = api.list_repo_tree(repository.repo_id, recursive=True, repo_type=kind)
    remote = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
    files = local_files(repository.folder)
    changed = [path for path, file in files.items() if path not in remote or differs(file, remote[path])]
    there = [path for path in remote if not path.startswith(".")]
    stale = [path for path in there if path not in files]
    if there and (changed or stale) and not replace:
        titles = {commit.title for commit in api.list_repo_commits(repository.repo_id, repo_type=kind)}
        if TITLE not in titles and titles != {"initial commit"}:  # the Hub's own, as of a new Space's welcome page
            raise PushError(
                f"it holds files of others, such as {min(there)}: give another --namespace or --name, or, if they "
                "may all go, --replace"
            )
    # The card last: it names what must be there, and a repository with a card is whole.
    changed.sort(key=lambda path: (path == "README.md", path))
    for start in range(0, len(changed), FILES_A_COMMIT):
        batch = changed[start : start + FILES_A_COMMIT]
        last = start + FILES_A_COMMIT >= len(changed)
        operations = [CommitOperationAdd(path, files[path]) for path in batch]
        operations += [CommitOperationDelete(path) for path in stale] if last else []
        api.create_commit(repository.repo_id, operations, commit_message=TITLE, repo_type=kind)
    if stale and not changed:
        deletions = [CommitOperationDelete(path) for path in stale]
        api.create_commit(repository.repo_id, deletions, commit_message="Remove old files", repo_type=kind)
    return len(changed) + len(stale)


def push(
    api: HfApi,
    repositories: list[Repository],
    *,
    namespace: str,
    title: str,
    private: bool,
    replace: bool = False,
) -> dict[str, int]:
    """Push every repository and collect them; returns how many files changed in each.

    Raises
    ------
    PushError
        Naming the repository that the Hub refused, and why. What was pushed before stays.
    """
    changes, where = {}, ""
    try:
        for repository in tqdm(repositories, desc="Pushing", unit="repository"):
            where = f"{repository.kind} {repository.repo_id}"
            changes[repository.repo_id] = push_repository(api, repository, private=private, replace=replace)
        where = f"the collection {title}"
        collection = api.create_collection(title, namespace=namespace, private=private, exists_ok=True)
        present = {item.item_id for item in collection.items}
        for repository in repositories:
            if repository.repo_id not in present:
                api.add_collection_item(collection.slug, repository.repo_id, repository.kind, exists_ok=True)
    except (HTTPError, OSError, ValueError) as error:
        raise PushError(
            f"{where} could not be pushed ({reason(error)}): mend that and push again, which goes on from here."
        ) from error
    return changes


def reason(error: Exception) -> str:
    """Why the Hub refused, in one line, without the token whatever the server echoed."""
    text = str(getattr(error, "server_message", None) or error).strip() or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    line = " ".join(text.split("\n")[0].split())
    token = get_token()
    if token:
        line = line.replace(token, "<token>")
    return f"HTTP {status}, {line}" if status and str(status) not in line else line


def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-push`."""
    parser = argparse.ArgumentParser(
        prog="wsdino-push",
        description="Publish a run's models, the metric and the dataset as repositories of the Hugging Face Hub. "
        "Files of these repositories that are no longer here are removed there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run folder with results.json")
    parser.add_argument("--namespace", metavar="ORG", help="user or organisation; default: the token's user")
    parser.add_argument("--name", help="what names begin with; default: wsdino-<network>-<dataset>")
    parser.add_argument("--dataset", metavar="FOLDER", help="the built dataset; default: the one trained on")
    parser.add_argument("--dataset_on_hub", metavar="ID", help="for cards, when the dataset is not among --parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to publish")
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.add_argument(
        "--replace", action="store_true", help="replace also what others put into a repository of that name"
    )
    parser.add_argument("--dry_run", type=Path, metavar="DIR", help="write the folders there and upload nothing")
    arguments = parser.parse_args(argv)
    try:
        publish(arguments)
    except (PushError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


def publish(arguments: argparse.Namespace) -> None:
    """Build the folders, then push them unless this is a dry run."""
    options = {name: getattr(arguments, name) for name in ("name", "dataset", "dataset_on_hub")}
    options["parts"] = tuple(arguments.parts)
    if arguments.dry_run is not None:
        if arguments.dry_run.exists() and any(arguments.dry_run.iterdir()):
            raise PushError(f"{arguments.dry_run} is not empty: name a new folder for the dry run.")
        namespace = arguments.namespace or "your-namespace"
        for repository in build_repositories(arguments.run, arguments.dry_run, namespace=namespace, **options):
            print(f"{repository.kind:<8}{repository.repo_id:<60}{repository.folder}")
        return
    api = HfApi()
    try:
        user = api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise PushError("there is no Hub token: log in with 'hf auth login' or set HF_TOKEN.") from None
    except (HTTPError, HfHubHTTPError, OSError) as error:
        raise PushError(f"the Hub did not accept the token ({reason(error)}): log in again.") from error
    namespace = arguments.namespace or user
    with tempfile.TemporaryDirectory() as staging:
        repositories = build_repositories(arguments.run, Path(staging), namespace=namespace, **options)
        models = [repository.repo_id.split("/")[1] for repository in repositories if repository.kind == "model"]
        # the combined model's name is what the others begin with
        title = min(models, key=len) if models else "wsdino"
        flags = {"private": arguments.private, "replace": arguments.replace}
        changes = push(api, repositories, namespace=namespace, title=title, **flags)
    for repo_id, count in changes.items():
        print(f"{repo_id}: {f'{count} files changed' if count else 'unchanged'}")


if __name__ == "__main__":
    main()
