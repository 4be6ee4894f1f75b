"""Publish a run: one repository per channel, the combined one, the metric, the dataset, and a collection of them all.

    wsdino-push runs/demo --dry_run hub               # write the repository folders, and upload nothing
    wsdino-push runs/bbbc021 --namespace my-lab       # create, upload, collect; repeat it after an interruption
    make release RUN=runs/cells NAME=cells LICENSE=apache-2.0    # networks in half precision -> release/cells*

Every repository is made to hold what is here: files that changed are uploaded, and files that are gone here are
removed there. So a second push changes nothing, and one that was interrupted continues. A repository of that name with
files that wsdino-push did not put there is refused, unless with --replace. The token is that of `hf auth login` or
HF_TOKEN.
"""

import argparse
import glob
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError
from tqdm.auto import tqdm

from model_cards import architecture_name, dataset_names, metric_card, model_card
from modeling_wsdino.build_repository import HALF, store_weights
from wsdino.errors import UserError, command, first_line
from wsdino.files import claim_folder, read_json, written_whole
from wsdino.run_folder import RunFolder

PARTS = ("models", "metric", "dataset")
METRIC = Path(__file__).parent / "evaluation_wsdino" / "not_same_compound"
METRIC_FILES = ("not_same_compound.py", "neighbours.py", "requirements.txt")
METRIC_PAGE = '<!doctype html><meta charset="utf-8"><title>Not same compound</title><p>See the README of this Space.\n'
TITLE = "Upload with wsdino-push"  # of commits, by which a repository is known as made here


@dataclass
class Repository:
    """A folder that is to be a repository of the Hub."""

    repo_id: str
    kind: str  # "model", "dataset" or "space", in the Hub's words
    folder: Path
    files: list[str] | None = None  # paths in the folder; None for all


def dataset_files(folder: Path) -> list[str]:
    """Paths of the files that wsdino-prepare wrote into a dataset's folder: nothing else in it is published."""

    def named(value: Any) -> Iterator[str]:
        if isinstance(value, dict) and {"path", "bytes"} <= value.keys():
            yield value["path"]
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from named(item)

    build = read_json(folder / "build.json", fix=f"{folder} is not a built dataset; give one with --dataset")
    files = ["README.md", "build.json", *named(build)]
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}: run wsdino-prepare again.")
    return files


def build_repositories(
    run: RunFolder, staging: Path, namespace: str, *, parts: Sequence[str] = PARTS, name: str | None = None,
    dataset: str | Path | None = None, dataset_on_hub: str | None = None, license: str = "apache-2.0",
    weights_dtype: str = "float32",
) -> list[Repository]:  # fmt: skip
    """Write the folders of a run's repositories; a dataset is taken where it lies.

    Each folder is written whole. One of an earlier call is replaced; anything else of its name is refused.

    Parameters
    ----------
    run : RunFolder
        With `results.json` and the models of its channels.
    staging : Path
        Where the folders are written, one per repository.
    namespace, name : str
        User or organisation, and what the repositories' names begin with (default `wsdino-<network>-<dataset>`).
    parts : sequence of str
        Which of models, metric and dataset.
    dataset : str or Path, optional
        The built dataset's folder; the one that the run was trained on if not given.
    dataset_on_hub : str, optional
        The dataset's repository for the cards to name, where the dataset is not published with them.
    license : str
        Licence of the weights for the models' cards, as the Hub spells it.
    weights_dtype : {"float32", "float16", "bfloat16"}
        How the models' weights are stored, see `store_weights`.

    Raises
    ------
    UserError
        The run was not evaluated or lacks a model, or the dataset's folder is not a built dataset.
    """
    results, channels = run.results(), run.trained_channels()
    slug, words = dataset_names(results)
    name = name or f"wsdino-{architecture_name(_config(run.model(channels[0])))}-{slug}"
    repositories, dataset_id = [], dataset_on_hub
    if "dataset" in parts:
        dataset = dataset or results["settings"]["dataset"].get("path")
        if not dataset or not Path(dataset).is_dir():
            raise UserError(
                f"The dataset {dataset or 'of the run'} is not a folder here: name it with --dataset, or leave it out "
                "with --parts models metric."
            )
        dataset_id = f"{namespace}/{f'{name}-screen' if results['simulated'] else slug}"
        repositories.append(Repository(dataset_id, "dataset", Path(dataset), dataset_files(Path(dataset))))
    if "metric" in parts:
        repository = Repository(f"{namespace}/not_same_compound", "space", staging / "not_same_compound")
        claim_folder(repository.folder, METRIC_FILES[0], "metric of wsdino-push")
        with written_whole(repository.folder) as partial:
            shutil.copytree(METRIC, partial, ignore=lambda _, names: set(names) - set(METRIC_FILES))
            (partial / "README.md").write_text(metric_card(repository.repo_id), encoding="utf-8")
            (partial / "index.html").write_text(METRIC_PAGE, encoding="utf-8")
        repositories.append(repository)
    if "models" in parts:
        models = {f"{name}-{channel}": run.model(channel) for channel in channels}
        if len(channels) > 1:
            models[name] = run.combined_model
        for model_name, source in models.items():
            repository = Repository(f"{namespace}/{model_name}", "model", staging / model_name)
            processor = read_json(source / "preprocessor_config.json", fix="finish the run's training")
            about = {"repo_id": repository.repo_id, "dataset_id": dataset_id, "dataset_name": words}
            about |= {"license": license, "weights_dtype": weights_dtype}
            card = model_card(results, _config(source), processor, **about)
            claim_folder(repository.folder, "configuration_wsdino.py", "WS-DINO repository")
            with written_whole(repository.folder) as partial:
                shutil.copytree(source, partial, ignore=shutil.ignore_patterns("__pycache__", "*.partial", ".*"))
                store_weights(partial, weights_dtype)
                (partial / "README.md").write_text(card, encoding="utf-8")
            repositories.append(repository)
    return repositories


def _config(folder: Path) -> dict:
    """The config.json of a model with the numbers that its name and card show."""
    needs = ("hidden_size", "num_hidden_layers", "num_attention_heads", "patch_size", "channel_names")
    config = read_json(folder / "config.json", needs=needs, fix="finish the run's training")
    if not all(isinstance(config[name], int) for name in needs[:4]) or not config["channel_names"]:
        raise UserError(f"{folder / 'config.json'} is damaged: train the run's models again.")
    return config


def push_repository(api: HfApi, repository: Repository, *, private: bool, replace: bool) -> bool:
    """Make a repository hold the folder's files and, but for hidden ones, no others; returns whether it changed.

    Raises
    ------
    UserError
        It is to be private, but exists and is public; or it holds what others put there, without `replace`.
    """
    about = {"repo_id": repository.repo_id, "repo_type": repository.kind}
    sdk = "static" if repository.kind == "space" else None
    api.create_repo(**about, private=private, exist_ok=True, space_sdk=sdk)
    before = api.repo_info(**about)
    if private and before.private is False:  # it existed before
        raise UserError("it is public: make it private in its settings, or leave out --private")
    present = [file.rfilename for file in before.siblings or [] if not file.rfilename.startswith(".")]
    if present and not replace:
        titles = {commit.title for commit in api.list_repo_commits(**about)}
        ours = any(title.startswith(TITLE) for title in titles)
        if not ours and titles != {"initial commit"}:  # the Hub's own, such as the welcome page of a new Space
            raise UserError(
                f"it holds files of others, such as {min(present)}: give another --namespace or --name, or --replace "
                "if they may all be deleted"
            )
    api.upload_folder(
        **about,
        folder_path=repository.folder,
        commit_message=TITLE,
        allow_patterns=repository.files and [glob.escape(name) for name in repository.files],
        delete_patterns="[!.]*",
    )
    return api.repo_info(**about).sha != before.sha


def push(
    api: HfApi, repositories: Sequence[Repository], namespace: str, title: str, **options: bool
) -> dict[str, bool]:
    """Push every repository and collect them; returns for each whether it changed.

    A `UserError` names the repository that was refused, and why; what was pushed before stays.
    """
    changes, where = {}, ""
    try:
        for repository in tqdm(repositories, desc="Pushing", unit="repository"):
            where = f"{repository.kind} {repository.repo_id}"
            changes[repository.repo_id] = push_repository(api, repository, **options)
        where = f"the collection {title}"
        collection = api.create_collection(title, namespace=namespace, private=options["private"], exists_ok=True)
        present = {item.item_id for item in collection.items}
        for repository in repositories:
            if repository.repo_id not in present:
                api.add_collection_item(collection.slug, repository.repo_id, repository.kind, exists_ok=True)
    except (HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{where} could not be pushed ({reason(error)}). Fix that and push again, which continues from here."
        ) from error
    return changes


def reason(error: Exception) -> str:
    """Why the Hub refused, in one line, without the token whatever the server echoed."""
    line = " ".join((getattr(error, "server_message", None) or first_line(error)).split())
    status = getattr(getattr(error, "response", None), "status_code", None)
    token = get_token()
    line = line.replace(token, "<token>") if token else line
    return f"HTTP {status}, {line}" if status and str(status) not in line else line


@command("wsdino-push")
def main(argv: list[str] | None = None) -> None:
    """The command `wsdino-push`: build the folders, then push them unless it is a dry run."""
    parser = argparse.ArgumentParser(
        prog="wsdino-push",
        description="Publish a run's models, the metric and the dataset as repositories of the Hugging Face Hub. "
        "Files of these repositories that are no longer here are removed there.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=RunFolder, help="run folder with results.json")
    parser.add_argument("--namespace", metavar="ORG", help="user or organisation; default: the token's user")
    parser.add_argument("--name", help="what names begin with; default: wsdino-<network>-<dataset>")
    parser.add_argument("--dataset", metavar="FOLDER", help="the built dataset; default: the one trained on")
    parser.add_argument("--dataset_on_hub", metavar="ID", help="for cards, when the dataset is not among --parts")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to publish")
    parser.add_argument("--license", default="apache-2.0", help="of the weights, for the models' cards")
    parser.add_argument(
        "--weights_dtype",
        choices=("float32", *HALF),
        default="float32",
        help="how the models' weights are stored; they are loaded as float32",
    )
    parser.add_argument("--private", action="store_true", help="create private repositories")
    parser.add_argument("--replace", action="store_true", help="delete what others put into a repository of that name")
    parser.add_argument("--dry_run", type=Path, metavar="DIR", help="write the folders there, upload nothing")
    arguments = parser.parse_args(argv)
    names = ("name", "dataset", "dataset_on_hub", "parts", "license", "weights_dtype")
    options = {name: getattr(arguments, name) for name in names}
    if arguments.dry_run is not None:
        namespace = arguments.namespace or "your-namespace"
        for repository in build_repositories(arguments.run, arguments.dry_run, namespace, **options):
            print(f"{repository.kind:<8}{repository.repo_id:<60}{repository.folder}")
        return
    api = HfApi()
    try:
        user = api.whoami()["name"]
    except LocalTokenNotFoundError:
        raise UserError("There is no Hub token: log in with 'hf auth login' or set HF_TOKEN.") from None
    except (HTTPError, OSError) as error:
        raise UserError(f"The Hub did not accept the token ({reason(error)}): log in again.") from error
    namespace = arguments.namespace or user
    with tempfile.TemporaryDirectory() as staging:
        repositories = build_repositories(arguments.run, Path(staging), namespace, **options)
        models = [repository.repo_id.split("/")[1] for repository in repositories if repository.kind == "model"]
        # The combined model's name is what the others begin with.
        title = min(models, key=len, default="wsdino")
        flags = {"private": arguments.private, "replace": arguments.replace}
        changes = push(api, repositories, namespace, title, **flags)
    for repo_id, changed in changes.items():
        print(f"{repo_id}: {'updated' if changed else 'unchanged'}")


if __name__ == "__main__":
    main()
