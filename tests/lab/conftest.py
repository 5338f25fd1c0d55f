"""A design of three words and 40 responses, small enough to be worked through by hand."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from lit_isdpo.lab.designs import Design, PairsPart, ResponseTree
from lit_isdpo.lab.environments import Enumerable
from lit_isdpo.policy.logprob_model import LogProbModel


def toy_model(design: Design, seed: int) -> LogProbModel:
    """A random model that says different things after different prompts."""
    torch.manual_seed(seed)
    return LogProbModel(LlamaForCausalLM(Enumerable(lambda: design).build_config()).eval())


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Design:
    """Gold is the number of words, 0.5 more for each "b"; pairs have one or two words."""
    tree = ResponseTree(num_words=3, max_words=3)
    gold = tree.lengths + 0.5 * (tree.words == 1).sum(dim=1).double()
    design = Design(
        name="toy",
        reference=tmp_path_factory.mktemp("toy") / "reference",
        vocabulary=("a", "b", "c"),
        tree=tree,
        prompts=((0, 1), (2, 2)),
        gold=gold.expand(2, -1),
        longer_gold=torch.full((2, 27), -4.0, dtype=torch.float64),
        malformed_gold=-4.0,
        target=torch.full((2, 40), 1 / 40, dtype=torch.float64),
        feature=tree.lengths,
        parts={
            "pairs": PairsPart((tree.lengths == 1) | (tree.lengths == 2)),
            "pairs_wrong_mu": PairsPart(tree.lengths == 3, true_mu=False),
        },
    )
    toy_model(design, seed=0).model.save_pretrained(design.reference)
    Enumerable(lambda: design).build_tokenizer().save_pretrained(design.reference)
    return design


@pytest.fixture(scope="session")
def toy_dir(toy: Design) -> Path:
    return toy.reference
