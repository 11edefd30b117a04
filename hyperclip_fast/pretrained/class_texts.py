"""What the classes of a classifier are called: names and definitions of single classes, and of the sets above them.

timm brings the lemmas and definitions of ImageNet's synsets. WordNet's noun file, where the user has it, gives the
hypernyms: "dog" for 118 breeds.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ClassTexts:
    """Texts that mean one class, or a set of them.

    Args:
        names: short ones.
        definitions: longer ones.
        members: indices of the classes.
    """

    names: tuple[str, ...]
    definitions: tuple[str, ...] = ()
    members: tuple[int, ...] = ()


def imagenet_texts(num_classes: int, wordnet: str | Path | None = None) -> list[ClassTexts]:
    """The texts of an ImageNet classifier's classes.

    Args:
        num_classes: of the classifier, by which timm knows the subset: 1,000, 11,821, 21,841, ...
        wordnet: folder of WordNet 3.0 with data.noun, for the hypernyms; None: without them.

    Raises:
        ValueError: for a number of classes that no subset has, or a folder that holds no WordNet.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": num_classes})
    if subset is None:
        raise ValueError(f"texts must be given for a classifier whose classes timm cannot name, {num_classes} of them")
    info: Any = ImageNetInfo(subset)
    texts = []
    for index, synset in enumerate(info.label_names()):
        names = tuple(info.label_name_to_description(synset).split(", "))
        definition = info.label_name_to_description(synset, detailed=True).partition(": ")[2]
        texts.append(ClassTexts(names, (definition, f"{names[0]}: {definition}"), (index,)))
    return texts if wordnet is None else texts + hypernym_texts(info.label_names(), wordnet)


def hypernym_texts(synsets: Sequence[str], folder: str | Path) -> list[ClassTexts]:
    """The texts of every synset that lies above at least two classes.

    Args:
        synsets: of the classes, such as "n02084071".
        folder: of WordNet 3.0, with data.noun.

    Raises:
        ValueError: for a folder without it, or synsets that it does not have.
    """
    nouns = _read_nouns(Path(folder) / "data.noun")
    if unknown := [synset for synset in synsets if synset not in nouns]:
        raise ValueError(f"wordnet must be WordNet 3.0, {folder} lacks {len(unknown)} synsets such as {unknown[0]}")
    members: dict[str, list[int]] = {}
    for index, synset in enumerate(synsets):
        for above in _above(synset, nouns):
            members.setdefault(above, []).append(index)
    found = []
    for synset, below in members.items():
        noun = nouns[synset]
        if len(below) > 1:
            found.append(ClassTexts(noun.names, (f"{noun.names[0]}: {noun.definition}",), tuple(below)))
    return found


@dataclass(frozen=True)
class _Noun:
    names: tuple[str, ...]
    definition: str
    hypernyms: tuple[str, ...]


def _read_nouns(path: Path) -> dict[str, _Noun]:
    """Every noun of WordNet's data.noun: offset, file, type, number of words in hex, words, pointers | gloss."""
    if not path.is_file():
        raise ValueError(f"wordnet must be a folder with data.noun, got {path.parent}")
    nouns = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        count = int(fields[3], 16)
        names = tuple(word.replace("_", " ") for word in fields[4 : 4 + 2 * count : 2])
        pointers = fields[5 + 2 * count :]
        hypernyms = tuple(f"n{pointers[i + 1]}" for i in range(0, len(pointers), 4) if pointers[i] in ("@", "@i"))
        nouns[f"n{fields[0]}"] = _Noun(names, gloss.strip().partition(";")[0], hypernyms)
    return nouns


def _above(synset: str, nouns: Mapping[str, _Noun]) -> Iterable[str]:
    """Every hypernym of a synset, direct or not, each once."""
    seen: dict[str, None] = {}
    waiting = [synset]
    while waiting:
        for above in nouns[waiting.pop()].hypernyms:
            if above not in seen:
                seen[above] = None
                waiting.append(above)
    return seen
