"""Experiment E1: whether a soft token of the user determines what a text stresses.

The users are those of MovieLens-100k, and the texts are made by a rule. The arm E2 writes real titles instead.

    python scripts/experiments/creator_e1.py --work runs/creator_e1 --arms A B --seeds 0 --steps 700

For every liked film with at least two genres and five earlier likes, the text is the genre of the film with the largest
lift among the user's latest 20 likes (`hllm_torchrec.creative.template`), which cannot be predicted without the user.
With `--feature cast`, on films that have plots as texts and `cast` as an item feature, it is an actor instead, and the
prompt has the plot. The test part has a fifth of the users. All arms use the same LLM, number of steps and seeds:

    A    item only: the learned tokens for unknown users (null) replace every user's soft token
    B    a soft token from the user encoder, which is trained, too
    C    B with a frozen user encoder
    D    the latest 20 likes with their genres as text in the prompt, without a user vector
    R    B with `creative.losses.recon` of a profile: the genres of the latest 20 likes with the largest lifts
    E2   B on other texts: the title of the next film that the user liked; the prompt does not mention the film

Reported for the users of the part (`--split`): nats per text given the right user, null, another user, and, with
`--clusters`, the mean user vector of the user's cluster (k-means of the soft tokens of the training texts; with
`--medoids` also the user vector nearest to the center). Accuracy among the film's genres is reported for the first
three (not for E2). A table of counts per film, the baseline without users, has nats and accuracy. The baselines of E2
have only nats: the frequencies of the titles, and EASE (`creator_ease.py`). Differences have 95% intervals by
resampling users. Finished runs and results are reused by the next call. Use `--split valid` (the default) to choose
settings.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from creator_ease import next_film_nats
from creator_tables import add_history, add_interests, word_tokenizer, write_next
from jobs import ROOT, run_job
from sklearn.cluster import KMeans

from hllm_torchrec.common.arrays import Doubles, Ints
from hllm_torchrec.common.run_log import read_log
from hllm_torchrec.data.creative_table import TEXTS, CreativeRows
from hllm_torchrec.data.creative_tokens import CreativeTokenizer, item_columns, pack_texts
from hllm_torchrec.data.dataset import Dataset
from hllm_torchrec.distributed.process_group import distributed_device
from hllm_torchrec.evaluation.creative_scores import (
    CreativeVectors,
    creative_vectors,
    other_users,
    score_vectors,
)
from hllm_torchrec.evaluation.run_loader import load_run
from hllm_torchrec.metrics.bootstrap import user_mean_interval
from hllm_torchrec.models.experiment import Experiment
from hllm_torchrec.modules.creative.creative_llm import PackedTexts
from hllm_torchrec.modules.creative.soft_prompt import SoftPrompt

ARMS: dict[str, list[str]] = {
    "A": ["--creative.soft.dropout=1.0"],
    "B": [],
    "C": ["--user.trainable=false"],
    "D": [
        "--creative.data=history",
        "--creative.soft.dropout=1.0",
        "--creative.max_prompt_length=640",
    ],
    "R": ["--creative.data=interests", "--creative.losses.recon=0.5", "--creative.profile.max_length=16"],
    "E2": ["--creative.data=next", "--creative.prompt=Next film:{user}", "--creative.max_response_length=32"],
}
WITHOUT_USER = ("A", "D")
"""Arms that never see a user vector."""
WRITERS: dict[str, list[str]] = {
    "smollm2": [],
    "words": [
        "--creative.shape={model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2, "
        "num_attention_heads: 4, vocab_size: VOCABULARY, tie_word_embeddings: true}",
        "--creative.pretrained=null",
        "--creative.layers=null",
        "--creative.freeze_words=false",
        "--optim.creative_lr=2.0e-3",
    ],
}
"""The first layers of SmolLM2; or a small model from scratch, whose tokens are the words of the catalogue and whose
steps cost a tenth."""
FEATURES = {"genres": "{title} ({genres}){user}", "cast": "{title}. {plot} With {cast}{user}"}
"""Item features that texts are about, with the prompts of their runs. The table of texts has the feature's name."""
AT_ONCE = 96
AMONG = ", among the film's values"
"""Suffix of the names of nats that are computed given that the text is one of the film's genres (or actors)."""


def train(arguments: argparse.Namespace, arm: str, seed: int) -> Path:
    """Train an arm, unless this has been done; returns its run."""
    work: Path = arguments.work
    models, base = arguments.models, work / "base"
    dataset, feature = Dataset.open(arguments.dataset), arguments.feature
    common = [f"--data.dataset={arguments.dataset}", f"--item_llm.pretrained={models}"]
    if not dataset.manifest["user_features"]:
        common.append("--data.user_features=[]")
    config = ROOT / "configs" / "ml100k" / "late.yaml"
    run_job(
        "train",
        ["--config", str(config), *common, f"--output={base}", "--resume=true"],
        work / "base.log",
        work / "base.done",
    )
    (work / "base.done").touch()
    table = arguments.dataset / "creatives" / feature
    build = ["build", "--dataset", str(arguments.dataset), "--name", feature, "--feature", feature]
    run_job("creatives", [*build, "--template", "{value}"], work / "build.log", table)
    if arm == "D":
        add_history(dataset, feature, "history", ("title", feature))
    elif arm == "R":
        add_interests(dataset, feature, "interests", feature)
    elif arm == "E2":
        write_next(dataset, "next")
    of = "" if feature == "genres" else f"-{feature}"
    run = work / f"{arguments.writer}{of}-{arm}-{arguments.steps}-{seed}"
    config = ROOT / "configs" / "creator" / "ml100k.yaml"
    own = [
        f"--output={run}",
        f"--start_from={base}",
        f"--seed={seed}",
        f"--max_steps={arguments.steps}",
        "--resume=true",
    ]
    epochs = -(-arguments.steps // 200)  # more than enough: max_steps ends the run
    own += [
        f"--stages=[{{name: writer, epochs: {arguments.alone}, item_embeddings: cached, trains: creative}}, "
        f"{{name: together, epochs: {epochs}, item_embeddings: cached}}]"
    ]
    own += ["--evaluation.checkpoint_every=100", "--evaluation.keep_last=1", *writer_options(arguments)]
    prompt = f"Liked: {{profile}}. Film: {FEATURES[feature]}" if arm == "D" else FEATURES[feature]
    own += [f"--creative.data={feature}", f"--creative.prompt={prompt}", "--creative.max_prompt_length=384"]
    own += ARMS[arm]
    own += arguments.options
    run_job("train", ["--config", str(config), *common, *own], work / f"{run.name}.log", work / f"{run.name}.done")
    (work / f"{run.name}.done").touch()
    return run


def writer_options(arguments: argparse.Namespace) -> list[str]:
    """Return the options of the Creative LLM; for "words" it also builds the tokenizer."""
    if arguments.writer == "smollm2":
        return [f"--creative.pretrained={arguments.models}", *WRITERS["smollm2"]]
    folder = arguments.work / "words"
    size = word_tokenizer(Dataset.open(arguments.dataset), folder)
    options = [option.replace("VOCABULARY", str(size)) for option in WRITERS["words"]]
    return [f"--creative.tokenizer={folder}", *options]


class Choices:
    """Candidate texts of the creatives `rows` [n] of a part: one for each value of the item's feature.

    owner: [C] position in `rows` of each candidate's creative; is_right: [C] whether it is the creative's own text.
    """

    def __init__(self, experiment: Experiment, part: CreativeRows, rows: Ints, feature: str = "genres") -> None:
        dataset = experiment.dataset
        values, offsets = dataset.feature_ids("item", feature)
        names = ["", *dataset.feature_values(feature).to_pylist()]
        items, right = part.item_ids[rows], part.rows["response"].take(rows).to_pylist()
        self.items = items
        texts = [[names[v] for v in values[offsets[item] : offsets[item + 1]]] for item in items]
        self.owner = np.repeat(np.arange(rows.size), [len(one) for one in texts])
        self.texts = [text for one in texts for text in one]
        self.is_right = np.array([text == right[n] for text, n in zip(self.texts, self.owner, strict=True)])
        assert self.is_right.sum() == rows.size, "each text is one of the item's values"
        tokenizer = CreativeTokenizer(experiment.config.creative)
        columns = item_columns(dataset, experiment.config.creative)
        filled = {name: [v[i] for i in items] for name, v in columns.items()}
        filled |= {name: part.rows[name].take(rows).to_pylist() for name in TEXTS if name not in filled}
        self._prompts = tokenizer.prompts(filled, rows.size)
        self._responses = tokenizer.responses(self.texts)

    def nll(self, experiment: Experiment, vectors: torch.Tensor, is_null: torch.Tensor) -> Doubles:
        """Compute the negative log-likelihood [C] of each candidate given the user vectors [n, D]."""
        owner = torch.from_numpy(self.owner)
        order = np.argsort([len(self._prompts[n].after) for n in self.owner], kind="stable")
        steps = [order[i : i + AT_ONCE] for i in range(0, order.size, AT_ONCE)]
        prefix = torch.empty(0, dtype=torch.int64)

        def texts(index: Ints) -> Any:
            return pack_texts(
                [self._prompts[self.owner[i]] for i in index], [self._responses[i] for i in index], prefix
            )

        found = np.empty(order.size)
        found[order] = torch.cat(score_vectors(experiment, steps, vectors[owner], is_null[owner], texts)).numpy()
        return found

    def choice_nats(self, nll: Doubles) -> Doubles:
        """Compute the nats [n] of each text if the model's probabilities are normalized over the candidates of the
        item."""
        share = np.exp(-nll)
        return -np.log(share / np.bincount(self.owner, share)[self.owner])[self.is_right]

    def accuracy(self, nll: Doubles) -> Doubles:
        """Return [n]: 1 if the creative's own text is the most likely candidate, 1 / number of ties, or 0."""
        best = np.full(self.items.size, np.inf)
        np.minimum.at(best, self.owner, nll)
        is_best = nll <= best[self.owner]
        ties = np.bincount(self.owner[is_best], minlength=best.size)
        return np.bincount(self.owner, (is_best & self.is_right) / ties[self.owner], minlength=best.size)


def count_table(train_part: CreativeRows, choices: Choices) -> tuple[Doubles, Doubles]:
    """Compute (nats, accuracy), [n] each, of the baseline without users: counts of texts per item in the training part.

    The counts are smoothed by the overall share of each text.
    """
    counts: dict[tuple[int, str], float] = {}
    overall: dict[str, float] = {}
    for item, text in zip(train_part.item_ids.tolist(), train_part.rows["response"].to_pylist(), strict=True):
        counts[item, text] = counts.get((item, text), 0.0) + 1
        overall[text] = overall.get(text, 0.0) + 1 / len(train_part)
    items = choices.items[choices.owner].tolist()
    mass = np.array([counts.get((i, t), 0.0) + overall.get(t, 1e-6) for i, t in zip(items, choices.texts, strict=True)])
    share = mass / np.bincount(choices.owner, mass)[choices.owner]
    return -np.log(share)[choices.is_right], choices.accuracy(-np.log(share))


def popularity(trained_on: Sequence[str], texts: Sequence[str]) -> Doubles:
    """Compute the nats of each text by its frequency in training; a text that does not occur there has the count
    0.5."""
    counts = Counter(trained_on)
    total = len(trained_on) + 0.5 * len(set(texts) - counts.keys())
    return np.array([-np.log((counts[text] or 0.5) / total) for text in texts])


def evaluate(arguments: argparse.Namespace, run: Path, arm: str) -> dict[str, Any]:
    """Evaluate a trained arm on the users of the part; the results are stored in a JSON file."""
    target = arguments.work / f"{run.name}-{arguments.split}.json"
    asked = {name: getattr(arguments, name) for name in ("clusters", "medoids", "evaluated")}
    if target.is_file():
        found = dict(json.loads(target.read_text(encoding="utf-8")))
        if found.get("asked") == asked:  # results computed with other settings are not reused
            return found
    with distributed_device() as device:
        loaded = load_run(run, "latest", device)
        with loaded.weights, loaded.experiment.evaluation_items():  # items are encoded once
            nats, hits, users = score(arguments, loaded.experiment, arm)
    found = {
        "arm": arm,
        "run": run.name,
        "split": arguments.split,
        "asked": asked,
        "steps": loaded.step,
        "creatives": int(users.size),
        "users": int(np.unique(users).size),
        "nats": {name: float(values.mean()) for name, values in nats.items()},
        "accuracy": {name: float(values.mean()) for name, values in hits.items()},
        "differences": differences(nats, users),
        "kept": kept(nats),
        "seconds_per_step": float(np.median([line["seconds"] for line in read_log(run) if line["event"] == "step"])),
    }
    target.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def score(
    arguments: argparse.Namespace, experiment: Experiment, arm: str
) -> tuple[dict[str, Doubles], dict[str, Doubles], Ints]:
    """Compute nats and accuracies [n] of the texts of a part by condition, and the texts' users [n]."""
    assert experiment.creatives is not None
    known = creative_vectors(experiment, arguments.split)
    chosen = np.sort(np.random.default_rng(0).permutation(len(known.loader))[: arguments.evaluated])
    users, vectors, nobody = known.user_ids[chosen], known.vectors[chosen], torch.ones(chosen.size, dtype=torch.bool)
    conditions = {"null": (vectors, nobody)}
    if arm not in WITHOUT_USER:
        donors = known.vectors[other_users(known.user_ids)[chosen]]
        conditions |= {"right": (vectors, ~nobody), "shuffled": (donors, ~nobody)}
    nats, hits = {}, {}
    rows = np.asarray(known.loader.tokens.rows)[chosen]
    if arm == "E2":
        nats = {name: nll_of_texts(experiment, known, chosen, *given) for name, given in conditions.items()}
        texts = known.loader.part.rows["response"].take(rows).to_pylist()
        nats["popularity"] = popularity(experiment.creatives.table.part("train").rows["response"].to_pylist(), texts)
        nats |= next_film_nats(experiment.creatives.table, arguments.split, rows)
    else:
        choices = Choices(experiment, known.loader.part, rows, arguments.feature)
        nll = {name: choices.nll(experiment, *given) for name, given in conditions.items()}
        nats = {name: values[choices.is_right] for name, values in nll.items()}
        hits = {name: choices.accuracy(values) for name, values in nll.items()}
        nats |= {f"{name}{AMONG}": choices.choice_nats(values) for name, values in nll.items()}
        nats["count table"], hits["count table"] = count_table(experiment.creatives.table.part("train"), choices)
    if arguments.clusters and arm not in WITHOUT_USER:
        trained_on = creative_vectors(experiment, "train").vectors
        assert experiment.hllm.creative_head is not None
        soft_prompt = experiment.hllm.creative_head.soft_prompt
        for number in arguments.clusters:
            for kind in ("cluster", "medoid")[: 1 + arguments.medoids]:
                given = centers(trained_on, vectors, number, soft_prompt, kind == "medoid")
                nats[f"{kind} {number}"] = nll_of_texts(experiment, known, chosen, given, ~nobody)
    return nats, hits, users


def nll_of_texts(
    experiment: Experiment, known: CreativeVectors, chosen: Ints, vectors: torch.Tensor, is_null: torch.Tensor
) -> Doubles:
    """Compute the negative log-likelihoods [n] of the creatives `chosen` [n] given the user vectors [n, D]."""
    order = np.argsort(known.loader.tokens.lengths[chosen], kind="stable")
    steps = [order[i : i + AT_ONCE] for i in range(0, order.size, AT_ONCE)]
    found = np.empty(order.size)
    texts = partial(_texts_of, known, chosen)
    found[order] = torch.cat(score_vectors(experiment, steps, vectors, is_null, texts)).numpy()
    return found


def _texts_of(known: CreativeVectors, chosen: Ints, index: Ints) -> PackedTexts:
    return known.loader.tokens.gather(chosen[index])


def centers(
    trained_on: torch.Tensor, vectors: torch.Tensor, number: int, tokens: SoftPrompt, is_medoid: bool = False
) -> torch.Tensor:
    """Return the center [n, D] of each vector's cluster, by k-means of the soft tokens of `trained_on` [N, D].

    vectors: [n, D]. is_medoid: a center is the vector whose tokens are the nearest to the fitted center, not the mean.

    Soft tokens are clustered, because distances between user vectors are dominated by directions that the Creative LLM
    does not use.
    """

    def read(users: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            return tokens(users, torch.zeros(len(users), dtype=torch.bool)).flatten(1).float().numpy()

    read_on = read(trained_on)
    fitted = KMeans(number, n_init=1, random_state=0).fit(read_on)
    of_vectors = torch.from_numpy(fitted.predict(read(vectors)).astype(np.int64))
    if is_medoid:
        nearest = torch.cdist(torch.from_numpy(fitted.cluster_centers_), torch.from_numpy(read_on)).argmin(1)
        return trained_on[nearest[of_vectors]]
    of_user = torch.from_numpy(fitted.labels_.astype(np.int64))
    means = torch.zeros(number, trained_on.shape[1]).index_add(0, of_user, trained_on)
    means = means / torch.bincount(of_user, minlength=number)[:, None]
    return means[of_vectors]


def differences(nats: dict[str, Doubles], users: Ints) -> dict[str, list[float]]:
    """Return mean and 95% interval over users of each condition's nats minus those of the right user."""
    if "right" not in nats:
        return {}
    found = {}
    for name in (name for name in nats if not name.startswith("right")):
        rights = [f"right{AMONG}"] if name.endswith(AMONG) else ["right"]
        if name == "count table":  # also normalized over the film's values
            rights.append(f"right{AMONG}")
        for right in (right for right in rights if right in nats):
            values = nats[name] - nats[right]
            found[f"{name} - {right}"] = [float(values.mean()), *user_mean_interval(values, users)]
    return found


def kept(nats: dict[str, Doubles]) -> dict[str, float]:
    """Return, for each clustering, (null - cluster) / (null - right).

    That is the share of the right user's gain in nats that the cluster's center keeps.
    """
    clusters = {name: values for name, values in nats.items() if name.startswith(("cluster", "medoid"))}
    return {
        name: float((nats["null"] - values).mean() / (nats["null"] - nats["right"]).mean())
        for name, values in clusters.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train and evaluate the arms, and print their figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "creator_e1", help="folder of runs and results")
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "ml-100k", help="prepared MovieLens-100k")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache" / "models" / "smollm2-135m-instruct")
    parser.add_argument("--writer", choices=WRITERS, default="smollm2", help="Creative LLM")
    parser.add_argument("--feature", choices=FEATURES, default="genres", help="item feature that texts are about")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["A", "B"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=700, help="training steps of 32 texts")
    parser.add_argument(
        "--alone", type=float, default=0.5, help="first epochs, in which only the Creative LLM is trained"
    )
    parser.add_argument("--evaluated", type=int, default=1500, help="number of texts to score")
    parser.add_argument("--split", choices=("valid", "test"), default="valid", help="part to evaluate on")
    parser.add_argument("--clusters", nargs="*", type=int, default=[], help="numbers of clusters, such as 1 8 64 256")
    parser.add_argument("--medoids", action="store_true", help="also the vector nearest to each center")
    parser.add_argument("options", nargs="*", help="options of `hllm train` for the arms, after --")
    arguments = parser.parse_args(argv)
    for name in ("work", "dataset", "models"):
        setattr(arguments, name, getattr(arguments, name).resolve())
    arguments.work.mkdir(parents=True, exist_ok=True)
    results = [
        evaluate(arguments, train(arguments, arm, seed), arm) for seed in arguments.seeds for arm in arguments.arms
    ]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
