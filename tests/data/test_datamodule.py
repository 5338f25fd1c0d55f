import shutil
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import datasets
import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lit_isdpo.data.collation import collate_pairs
from lit_isdpo.data.datamodule import PreferenceDataModule, SFTDataModule
from lit_isdpo.data.tokenized_rows import Recipe
from lit_isdpo.training.reading import WholeSteps, hand_over
from lit_isdpo.types import InputError, PreferenceBatch, SFTBatch, TokenizedPair
from tests.data.conftest import RANKED, pairs

# Lightning 2.6 asks torch's tree specifications in a way that newer torch warns about.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
REAL = Path(__file__).parents[3] / "shared" / "data"


class Reader(LightningModule):
    """Learns nothing, and writes down which rows it is given."""

    shares_prompts = mixes_pairs = False
    ranks = None

    def __init__(self, save_at=None, path=None, hook=""):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "val": [], "test": [], "predict": []}
        self.save_at, self.path, self.hook = save_at, path, hook

    def configure_callbacks(self):
        data = self.trainer.datamodule
        hand_over(self.trainer, data, shares_prompts=lambda: self.shares_prompts, mixes_pairs=self.mixes_pairs)
        if self.ranks is not None:
            data.read_for(replace(data.reader, world_size=self.ranks[1], rank=lambda: self.ranks[0]))
        return [WholeSteps()]

    def training_step(self, batch):
        self.seen["train"].append(batch.row_ids.tolist())
        return self.weight.sum()

    def validation_step(self, batch):
        self.seen["val"].append(batch.row_ids.tolist())

    def test_step(self, batch):
        self.seen["test"].append(batch.row_ids.tolist())

    def predict_step(self, batch):
        self.seen["predict"].append(batch.row_ids.tolist())
        return batch.row_ids

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *args):
        self.save("on_train_batch_end")

    def on_train_epoch_end(self):
        self.save("on_train_epoch_end")

    def save(self, hook):
        if hook == self.hook and self.trainer.global_step == self.save_at and not self.path.exists():
            self.trainer.save_checkpoint(self.path)


def make_trainer(**options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Trainer(**quiet, enable_checkpointing=False, num_sanity_val_steps=0, **{"max_epochs": 3} | options)


def test_batches_of_every_stage(make):
    reader, data = Reader(), make(micro_batch_size=2, eval_batch_size=2)
    trainer = make_trainer(max_epochs=1)
    trainer.fit(reader, data)
    assert trainer.global_step == data.order.steps_per_epoch == 5
    assert trainer.accumulate_grad_batches == 2
    assert [len(rows) for rows in reader.seen["train"]] == [2] * 10
    assert reader.seen["val"] == [[0, 1], [2, 3], [4]]
    trainer.test(reader, data, verbose=False)
    trainer.predict(reader, data)
    assert reader.seen["test"] == reader.seen["predict"] == [[0, 1], [2]]


def test_several_pairs_share_a_row_where_they_are_packed(make):
    reader, data = Reader(), make(packing_length=10_000)
    reader.shares_prompts = True
    make_trainer(max_steps=1).fit(reader, data)
    batch = next(iter(data.train_dataloader()))
    assert len(batch.row_ids) == 4
    assert len(batch.tokens.input_ids) == 1
    assert next(iter(data.val_dataloader())).tokens.input_ids.shape[0] == 1


@pytest.mark.parametrize(("split", "num"), [(None, 3), ("train", 22), ("val", 5), ("test", 3)])
def test_predict_takes_the_rows_that_are_asked_for(make, split, num):
    reader = Reader()
    make_trainer().predict(reader, make(predict_split=split))
    assert sorted(row for rows in reader.seen["predict"] for row in rows if row >= 0) == list(range(num))


def test_predict_on_the_training_rows_leaves_out_what_is_held_out(make, folder):
    train, val = Reader(), Reader()
    for reader, split in ((train, "train"), (val, "val")):
        make_trainer().predict(reader, make(train=str(folder / "train.jsonl"), val_size=6, predict_split=split))
    rows = [{row for rows in reader.seen["predict"] for row in rows if row >= 0} for reader in (train, val)]
    assert (len(rows[0]), len(rows[1])) == (16, 6)
    assert not rows[0] & rows[1]


def test_no_advice_about_workers(make, monkeypatch):
    """Lightning warns where a machine has more cores than this one may have; warnings are errors here."""
    connector = "lightning.pytorch.trainer.connectors.data_connector"
    monkeypatch.setattr(f"{connector}.suggested_max_num_workers", lambda devices: 8)
    make_trainer(max_steps=1).fit(Reader(), make())


def test_items_are_what_the_rows_say(make):
    data = make(val_size=1)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, PreferenceBatch)
    assert batch.row_ids.tolist() == [0, 1, 2, 3]
    chosen = batch.tokens.completion_ids[0][batch.tokens.completion_mask[0]]
    assert data.tokenizer.decode(chosen, skip_special_tokens=False) == " 100<eos>"
    data = make(SFTDataModule)
    data.setup("validate")
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch, SFTBatch)
    chosen = batch.tokens.completion_ids[0][batch.tokens.completion_mask[0]]
    assert data.tokenizer.decode(chosen, skip_special_tokens=False) == " 100<eos>"


@pytest.mark.parametrize(
    ("num_workers", "length"),
    [(0, {"max_epochs": 3}), (0, {"max_epochs": -1, "max_steps": 13}), (2, {"max_epochs": 2})],
)
def test_a_resumed_run_reads_what_the_straight_run_read(make, tmp_path, num_workers, length):
    """5 steps an epoch, 2 micro-batches a step: stopped in epoch 0, at its end, and in epoch 1."""
    cases = [(2, "on_train_batch_end"), (5, "on_train_batch_end"), (5, "on_train_epoch_end"), (7, "on_train_batch_end")]
    cases = cases if num_workers == 0 else cases[:1] + cases[-1:]
    for step, hook in cases:
        path = tmp_path / f"{step}_{hook}_{num_workers}.ckpt"
        straight = Reader(step, path, hook)
        make_trainer(**length).fit(straight, make(micro_batch_size=2, num_workers=num_workers))
        resumed = Reader()
        trainer = make_trainer(**length)
        trainer.fit(resumed, make(micro_batch_size=2, num_workers=num_workers), ckpt_path=path)
        assert len(straight.seen["train"]) == 2 * trainer.global_step
        assert resumed.seen["train"] == straight.seen["train"][2 * step :], (step, hook)
    epochs = [straight.seen["train"][10 * epoch :][:10] for epoch in range(2)]
    assert epochs[0] != epochs[1]


def test_a_limited_epoch_goes_on_where_it_stopped(make):
    reader = Reader()
    make_trainer(limit_train_batches=3, max_epochs=2).fit(reader, make())
    straight = Reader()
    make_trainer(max_epochs=2).fit(straight, make())
    assert reader.seen["train"] == straight.seen["train"][:6]


def test_a_resume_on_other_data_is_said(make, tmp_path, write_rows):
    path = tmp_path / "a.ckpt"
    make_trainer(max_epochs=1).fit(Reader(5, path, "on_train_epoch_end"), make())
    other = write_rows(tmp_path / "other.jsonl", pairs(30, 50))
    with pytest.warns(UserWarning, match="trained with other tokens of rows, batch_size; training goes on at its step"):
        make_trainer(max_steps=7).fit(Reader(), make(train=other, batch_size=8), ckpt_path=path)


def test_checkpoints_hold_plain_types(make, tmp_path):
    path = tmp_path / "a.ckpt"
    make_trainer(max_steps=2).fit(Reader(2, path, "on_train_batch_end"), make())
    saved = torch.load(path, weights_only=True)["datamodule_hyper_parameters"]
    assert saved["train"][0]["weight"] == 1.0
    assert saved["batch_size"] == 4
    assert PreferenceDataModule(**saved).sources == make().sources


def test_two_ranks_step_on_the_rows_of_one(make):
    alone = Reader()
    make_trainer(max_epochs=1).fit(alone, make())
    ranks = []
    for rank in range(2):
        reader = Reader()
        reader.ranks = (rank, 2)
        make_trainer(max_epochs=1).fit(reader, make())
        ranks.append(reader.seen)
    together = [a + b for a, b in zip(ranks[0]["train"], ranks[1]["train"], strict=True)]
    assert [set(rows) for rows in together] == [set(rows) for rows in alone.seen["train"]]
    assert (ranks[0]["val"], ranks[1]["val"]) == ([[0, 2], [4]], [[1, 3], [-1]])


def test_a_module_that_does_not_say_who_reads_is_refused(make):
    """Else every rank of it would read all rows."""

    class Silent(Reader):
        def configure_callbacks(self):
            return []

    with pytest.raises(InputError, match=r"no module has told who reads the rows; call TextDataModule\.read_for"):
        make_trainer(max_steps=1).fit(Silent(), make())


def test_the_trainer_gets_its_limits_back(make):
    trainer = make_trainer(limit_train_batches=3, max_epochs=1)
    trainer.fit(Reader(), make(micro_batch_size=2))
    assert trainer.limit_train_batches == 3
    assert trainer.global_step == 2, "the last step is whole"


def test_text_that_is_not_utf8_is_an_error(make, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl.*(UTF-8|utf-8)"):
        make(train=str(tmp_path / "a.jsonl")).setup("fit")


def test_the_second_start_tokenizes_nothing(make, monkeypatch):
    make().setup("fit")
    original, calls = Recipe._line, []

    def line(recipe, example):
        calls.append(example)
        return original(recipe, example)

    monkeypatch.setattr(Recipe, "_line", line)
    data = make()
    data.setup("fit")
    assert calls == []
    make(max_length=20).setup("fit")
    assert len(calls) == 27
    make(SFTDataModule, max_length=20).setup("fit")
    assert len(calls) == 54
    make(max_length=20, weight_column="weight").setup("fit")
    assert len(calls) == 81


def test_several_processes_tokenize_alike(make):
    one, two = make(), make(num_proc=2, max_length=1000)
    one.setup("validate")
    two.setup("validate")
    assert one.splits.rows["val"].table[:] == two.splits.rows["val"].table[:]
    assert two.splits.rows["val"].table["row"][:] == [0, 1, 2, 3, 4]


def test_prompts_are_the_first_different_ones(make, tmp_path, write_rows):
    rows = [{"prompt": f"p{i // 2}", "chosen": f" {i}", "rejected": "?"} for i in range(8)]
    data = make(val=write_rows(tmp_path / "a.jsonl", rows))
    data.setup("validate")
    assert [prompt[1:4] for prompt in data.prompts("val", 3)] == [("p0", " 0", 0), ("p1", " 2", 2), ("p2", " 4", 4)]
    assert data.prompts("val", 1)[0].prompt_ids[0] == data.tokenizer.bos_token_id
    assert len(data.prompts("val", 99)) == 4


def test_weights_and_margins_reach_the_batch_where_they_are_named(make):
    for options, weights, margin in (
        ({}, [1.0, 1.0, 1.0, 1.0], 0.0),
        ({"weight_column": "weight", "margin_column": "margin"}, [50.0, 50.5, 51.0, 51.5], 1.0),
    ):
        data = make(**options)
        data.setup("validate")
        batch = next(iter(data.val_dataloader()))
        assert batch.pair_weights.tolist() == weights
        assert batch.margins.tolist() == [margin] * 4
    assert PreferenceDataModule(**data.hparams).read_options == data.read_options


def test_weights_of_a_csv_file_are_numbers(make, tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("prompt,chosen,rejected,w\na,1,2,0.5\nb,3,4,\nc,5,6,heavy\nd,7,8,-1\ne,9,10,2\n")
    data = make(train=str(file), val_size=1, batch_size=1, weight_column="w", max_dropped_fraction=0.6)
    data.setup("fit")
    assert data.splits.counts["train"][0].dropped == {
        "malformed row: w is empty": 1,
        "malformed row: w is a text that is no number": 1,
        "malformed row: w is below 0": 1,
    }
    assert sorted(data.splits.rows["train"].table["weight"], key=str) == [0.5, 2.0, None, None, None]


def test_weights_that_cannot_be_are_refused(make, tmp_path, write_rows):
    with pytest.raises(
        InputError, match=r"data\.margin_column: no column 'm'; it has prompt, chosen, rejected, weight"
    ):
        make(margin_column="m").setup("fit")
    file = write_rows(tmp_path / "a.jsonl", [row | {"weight": 0} for row in pairs(4)])
    with pytest.raises(InputError, match=r"a\.jsonl: data\.weight_column: all weights in 'weight' are 0"):
        make(train=file, weight_column="weight").setup("fit")


def test_demonstrations_of_several_responses_are_the_best(make, tmp_path, write_rows):
    data = make(SFTDataModule, val=write_rows(tmp_path / "a.jsonl", RANKED))
    data.setup("validate")
    assert [prompt.response for prompt in data.prompts("val", 9)][::2] == ["3", "1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "data.batch_size must be at least 1, not 0"),
        ({"micro_batch_size": 0}, "data.micro_batch_size must be at least 1, not 0"),
        ({"eval_batch_size": 0}, "data.eval_batch_size must be at least 1, not 0"),
        ({"num_workers": -1}, "data.num_workers must be at least 0, not -1"),
        ({"max_length": 1}, "data.max_length must be at least 2, not 1"),
        ({"max_prompt_length": 0}, "data.max_prompt_length is 0"),
        ({"max_length": 8, "max_prompt_length": 8}, "less than data.max_length, which is 8"),
        ({"val_size": 0.0}, "data.val_size is 0.0"),
        ({"val_size": 1.0}, "data.val_size is 1.0"),
        ({"val_size": 0}, "data.val_size is 0;"),
        ({"format": "alpaca"}, "data.format is 'alpaca'; known: auto"),
        ({"pairing": "some"}, "data.pairing is 'some'; known: best_worst, best_random, all"),
        ({"format": "strings", "pairing": "all"}, "^data.pairing is 'all', but a row of format 'strings'"),
        ({"predict_split": "dev"}, "data.predict_split is 'dev'; known: train, val, test"),
        ({"val": {"path": "a", "weight": 2}}, "data.val, data.test: weights are for data.train"),
    ],
)
def test_arguments_out_of_range_are_refused(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        ({"batch_size": 23}, {}, "data.batch_size is 23, more than the 21 rows of an epoch"),
        ({"micro_batch_size": 3}, {}, r"which data.micro_batch_size 3 x 1 rank\(s\) does not divide"),
        ({"micro_batch_size": 8}, {}, "data.batch_size is 4, which data.micro_batch_size 8"),
        ({"micro_batch_size": 2}, {"accumulate_grad_batches": 4}, "is 4, but .* make it 2; leave it out"),
        ({"val_size": 22, "val": None}, {}, "no rows are left to train on"),
        ({"format": "messages"}, {}, "none of the 22 rows can be used: 22 x malformed row"),
    ],
)
def test_what_does_not_fit_together_is_refused(make, folder, options, trainer, message):
    (folder / "val.jsonl").unlink()
    with pytest.raises(InputError, match=message):
        make_trainer(**trainer).fit(Reader(), make(**options))


def test_a_weight_that_leaves_no_row_is_refused(make, folder):
    with pytest.raises(InputError, match=r"the weight 0\.01 of '.*' leaves no row"):
        make(train=[str(folder), {"path": str(folder), "weight": 0.01}]).setup("fit")


def test_accumulation_set_to_what_it_is_anyway_is_accepted(make):
    trainer = make_trainer(max_steps=1, accumulate_grad_batches=2)
    trainer.fit(Reader(), make(micro_batch_size=2))
    assert trainer.accumulate_grad_batches == 2


@pytest.mark.skipif(not REAL.is_dir(), reason="no real data here")
def test_real_transcripts(make, tmp_path):
    shutil.copy(REAL / "hh_harmless" / "test.jsonl.gz", tmp_path)
    data = make(train=str(tmp_path / "test.jsonl.gz"), max_length=300)
    data.setup("fit")
    (counts,) = data.splits.counts["train"]
    assert (counts.format, counts.read) == ("transcripts", 300)
    assert counts.dropped["two different prompts"] == 1
    rows = datasets.load_dataset("json", data_files=str(tmp_path / "test.jsonl.gz"), split="train")
    row_id, pair = data.splits.rows["train"][0]
    text = data.tokenizer.decode([*pair.prompt_ids, *pair.chosen_ids], skip_special_tokens=True)
    assert text in rows[row_id]["chosen"]


def test_lightning_moves_a_whole_batch_without_waiting_for_a_gpu():
    """A copy that waits would have the host wait for all that the GPU was given before, once a tensor."""
    moved = []

    class Moves(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is not Tensor.to:
                return func(*args, **(kwargs or {}))
            moved.append(kwargs)
            return args[0]

    batch = collate_pairs([TokenizedPair([1, 5], [6, 2], [7])], [0], pad_token_id=0, layout="shared")
    with Moves():
        assert move_data_to_device(batch, torch.device("cuda")).num_counted == 1
    assert moved == [{"non_blocking": True}] * 13  # eight of tokens, four numbers of pairs, and the row ids


def test_a_number_of_pairs_is_declared_once_more_and_is_in_the_batch():
    """Whatever stands between the ids and the changes of an item; a number that the data has not is NaN."""

    class JudgedPair(NamedTuple):
        prompt_ids: list[int]
        chosen_ids: list[int]
        rejected_ids: list[int]
        weight: float = 1.0
        agreement: float | None = None
        changes: tuple[str, ...] = ()

    items = [JudgedPair([1], [2], [3], agreement=0.75), JudgedPair([1], [2], [3])]
    batch = collate_pairs(items, [0, 1], pad_token_id=0)
    assert batch.numbers.keys() == {"weight", "agreement"}
    assert batch.pair_weights.tolist() == [1, 1]
    assert batch.numbers["agreement"][0] == 0.75
    assert batch.numbers["agreement"].isnan().tolist() == [False, True]
