"""What a rank of ``test_sharding.py`` does: loads models in parts, and compares them with whole ones."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.policy import sharding as sharding_module
from lit_isdpo.policy.attention import why_not_shared
from lit_isdpo.policy.loading import PolicyConfig
from lit_isdpo.policy.logprob_model import LogProbModel, full_tensor, load_logprob_model
from lit_isdpo.policy.reference import AdapterOffReference
from lit_isdpo.policy.sharding import Sharding
from lit_isdpo.types import InputError, TokenizedPair

PAIRS = [TokenizedPair([1, 5, 7], [6, 2], [8, 9, 2]), TokenizedPair([1], [7, 2], [9, 2])]
TOKENS = collate_pairs(PAIRS, range(2), pad_token_id=0, layout="shared").tokens
CPU = torch.device("cpu")


def assert_is(model: LogProbModel, expected: LogProbModel) -> None:
    """Every tensor has the same values, of which this rank holds a part, and the model says the same."""
    ours = dict(model.model.named_parameters()) | dict(model.model.named_buffers())
    theirs = dict(expected.model.named_parameters()) | dict(expected.model.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.device == CPU, name
        assert tensor.requires_grad == theirs[name].requires_grad, name
        torch.testing.assert_close(full_tensor(tensor.detach()), theirs[name].detach(), atol=0, rtol=0, msg=name)
    local = sum(tensor.to_local().numel() for tensor in model.parameters() if isinstance(tensor, DTensor))
    assert local < 0.75 * sum(tensor.numel() for tensor in expected.parameters())
    assert model.tried(why_not_shared) == expected.tried(why_not_shared)
    assert model.how_to_sample == expected.how_to_sample
    torch.testing.assert_close(model(TOKENS).logps, expected(TOKENS).logps, atol=1e-5, rtol=1e-5)


def load(sharding: Sharding, options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch) -> LogProbModel:
    """A model in parts, and by which way it came."""
    taken: list[str] = []
    read, receive = sharding_module._read_slices, Sharding._receive

    def reads(*args: Any) -> None:
        taken.append("slices")
        read(*args)

    def receives(*args: Any) -> None:
        taken.append("rank 0")
        receive(*args)

    monkeypatch.setattr(sharding_module, "_read_slices", reads)
    monkeypatch.setattr(Sharding, "_receive", receives)
    torch.manual_seed(0)
    model = sharding.load(PolicyConfig(**options))
    assert taken == [way], options
    return model


def same_gradients(model: LogProbModel, expected: LogProbModel) -> None:
    """Of a mean over ranks that all have the same rows."""
    for one in (model, expected):
        one.train()
        one(TOKENS).logps.sum().backward()
    theirs = {name: parameter.grad for name, parameter in expected.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = theirs[name]
        assert (parameter.grad is None) == (gradient is None), name
        if gradient is not None and parameter.grad is not None:
            torch.testing.assert_close(full_tensor(parameter.grad), gradient, atol=1e-5, rtol=1e-4, msg=name)


def run(cases: list[tuple[str, dict[str, Any], str]]) -> None:
    dist.init_process_group("gloo")
    size = dist.get_world_size()
    shardings = {"all": Sharding.over(size, None, CPU), "offloaded": Sharding.over(size, None, CPU, cpu_offload=True)}
    for name, options, way in cases:
        with pytest.MonkeyPatch.context() as monkeypatch:
            for kind, sharding in shardings.items():
                if kind == "offloaded" and name != "untied":
                    continue
                model = load(sharding, options, way, monkeypatch)
                torch.manual_seed(0)
                expected = load_logprob_model(PolicyConfig(**options))
                assert_is(model, expected)
                same_gradients(model, expected)
                if model.adapter is not None:
                    with AdapterOffReference(model).scoring() as reference:
                        assert reference is model
                    assert model.adapter.base_fingerprint == expected.adapter.base_fingerprint  # type: ignore[union-attr]
                print(f"{name}, {kind}: the same")
    copies = Sharding.over(size, 1, CPU)
    assert copies.mesh.mesh_dim_names == ("replicate", "shard")
    with pytest.raises(InputError, match="3 ranks do not divide 2"):
        Sharding.over(size, 3, CPU)
    untied = next(options for name, options, _ in cases if name == "untied")
    replicated = copies.load(PolicyConfig(**untied))
    same_gradients(replicated, load_logprob_model(PolicyConfig(**untied)))
    broken_for_rank_1(shardings["all"], untied)


def broken_for_rank_1(sharding: Sharding, options: dict[str, Any]) -> None:
    """A file that one rank cannot read ends all of them with the same sentence."""
    read = sharding_module._read_slices

    def fails(model: PreTrainedModel, folder: Path, config: PolicyConfig, option: str) -> None:
        if dist.get_rank() == 1:
            raise InputError("rank 1 could not read it")
        read(model, folder, config, option)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sharding_module, "_read_slices", fails)
        with pytest.raises(InputError, match="rank 1 could not read it"):
            sharding.load(PolicyConfig(**options))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(json.loads(sys.argv[1]))
