"""A standard library of a few files, and trainings of a tiny model on it, for tests."""
import torch

from kernels.model.config import preset
from kernels.training.corpus import gather
from kernels.training.recipe import Recipe
from kernels.training.trainer import Trainer

TINY = preset("tiny")
QUICK = Recipe(steps=3, batch=2, length=16, warmup=1, rate=1e-2, scored=1)


def library(folder, files=170, lines=600):
    """A folder of Python files, of which every tenth is long enough to be held out in part."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        text = "".join(f"def f{j}(x):\n    return x + {i * j}\n" for j in range(lines if i % 10 == 5 else 4))
        (folder / f"m{i:03}.py").write_text(text)
    (folder / "LICENSE.txt").write_text("a licence\n")
    return folder


def corpus(tmp_path_factory):
    return gather(library(tmp_path_factory.mktemp("stdlib") / "lib"), "3.11.7")


def trained(corpus, recipe=QUICK, config=TINY, device="cpu", every=1):
    """(the trainer, its rows)"""
    trainer = Trainer(config, recipe, corpus, torch.device(device))
    return trainer, trainer.run(every)
