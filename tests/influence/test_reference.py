"""The reference set: grouping rows by length changes the cost of a pass, and nothing else."""

import pytest
import torch
from fakes import FakeSource
from hand_flops import attention
from probing import VOCAB, mean_loss, tiny_model, warm_context

from liveselect.functional.flops import flops_counted
from liveselect.influence.reference import ReferencePass, charge_gradient, group_by_length
from liveselect.losses import causal_lm_loss


def ragged_batches(left=False, count=3, rows=5, width=14, seed=0):
    """Padded batches in which only the last words of every row carry loss; one row carries none."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        tokens = torch.randint(1, VOCAB, (rows, width), generator=generator)
        labels = torch.full_like(tokens, -100)
        mask = torch.zeros_like(tokens)
        for row, length in enumerate(torch.randint(4, width + 1, (rows,), generator=generator).tolist()):
            inside = slice(width - length, width) if left else slice(0, length)
            mask[row, inside] = 1
            last = inside.stop - 1 - int(torch.randint(0, 2, (), generator=generator))
            labels[row, last - 1 : last + 1] = tokens[row, last - 1 : last + 1]
        batches.append({"input_ids": tokens * mask, "labels": labels, "attention_mask": mask})
    batches[0]["labels"][0] = -100
    return batches


class RaggedSource(FakeSource):
    def __init__(self, batches):
        super().__init__(torch.zeros(8, 12, dtype=torch.int64))
        self.batches = batches

    def reference(self):
        return iter(self.batches)


def total(model, batches):
    """Summed loss and number of targets, from one row after the other."""
    pairs = [
        (causal_lm_loss(model, row) * (row["labels"][:, 1:] != -100).sum(), (row["labels"][:, 1:] != -100).sum())
        for batch in batches
        for row in ({key: value[i : i + 1] for key, value in batch.items()} for i in range(len(batch["input_ids"])))
    ]
    return sum(loss for loss, _ in pairs).item(), sum(int(count) for _, count in pairs)


@pytest.mark.parametrize("left", [False, True])
def test_grouping_by_length_keeps_every_target_and_its_loss(left):
    model = tiny_model().eval()
    batches = ragged_batches(left)
    grouped = group_by_length(batches)
    before, after = total(model, batches), total(model, grouped)
    assert before[1] == after[1]
    assert after[0] == pytest.approx(before[0], rel=1e-12)


def test_groups_hold_no_more_tokens_than_the_largest_batch_and_waste_less():
    batches = ragged_batches(rows=8, width=20)
    grouped = group_by_length(batches)
    sizes = [batch["input_ids"].numel() for batch in grouped]
    assert max(sizes) <= 8 * 20
    assert sum(sizes) < sum(batch["input_ids"].numel() for batch in batches)
    widths = [batch["input_ids"].shape[1] for batch in grouped]
    assert widths == sorted(widths, reverse=True)


def test_whole_blocks_stay_whole():
    tokens = torch.arange(24).reshape(4, 6)
    (group,) = group_by_length([{"id": torch.arange(4), "input_ids": tokens}])
    assert torch.equal(group["input_ids"], tokens)
    assert torch.equal(group["labels"], tokens)


@pytest.mark.parametrize(
    "extra",
    [{"attention_mask": torch.ones(4, 1, 6, 6)}, None],
    ids=["a mask for each pair", "a mask in one batch only"],
)
def test_batches_that_cannot_be_cut_by_columns_are_left_alone(extra):
    batch = {"input_ids": torch.arange(24).reshape(4, 6)}
    batches = [{**batch, **extra}] if extra else [batch, {**batch, "attention_mask": torch.ones(4, 6)}]
    assert group_by_length(batches) is batches


def test_a_mask_is_dropped_where_it_hides_nothing_to_the_left_of_a_target():
    assert all("attention_mask" not in batch for batch in group_by_length(ragged_batches(left=False)))
    assert all("attention_mask" in batch for batch in group_by_length(ragged_batches(left=True)))


def test_flops_count_the_head_at_targets_only():
    context = warm_context().but(source=RaggedSource(ragged_batches()))
    reference = ReferencePass.load(context.live, context.round)
    found = []
    for module in context.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda layer, args, out: found.append(2 * layer.weight.numel() * args[0].shape[:-1].numel())
            )
    reference.loss(context.live)
    widths = [batch["input_ids"].shape for batch in reference.batches]
    attended = sum(attention(context.model, rows, width) for rows, width in widths)
    assert context.meter.flops["other"] == sum(found) + attended


@pytest.mark.parametrize("prepared", [True, False])
def test_a_gradient_is_charged_what_it_computes_though_only_two_rows_were_counted(prepared):
    context = warm_context().but(source=RaggedSource(ragged_batches()))
    parameters = dict(context.model.named_parameters())
    if prepared:
        batches = ReferencePass.load(context.live, context.round).batches
        assert max(len(batch["input_ids"]) for batch in batches) > 2
    else:
        batches = context.source.batches
    expected = 0.0
    for batch in batches:
        charge_gradient(context.live, batch, list(parameters.values()))
        with flops_counted(context.model) as flops:
            causal_lm_loss(context.model, batch).sum().backward()
        expected += flops.total
    assert context.meter.flops["other"] == expected > 0


@pytest.mark.parametrize("left", [False, True])
def test_the_reference_loss_is_the_mean_over_all_targets(left):
    context = warm_context().but(source=RaggedSource(ragged_batches(left)))
    context.model.eval()
    reference = ReferencePass.load(context.live, context.round)
    loss, count = total(context.model, context.source.batches)
    assert reference.targets == count
    assert reference.examples == 14  # the row without targets is left out
    assert reference.loss(context.live) == pytest.approx(loss / count, rel=1e-12)


def test_a_custom_loss_is_given_the_batches_of_the_source():
    context = warm_context()
    seen = []

    def loss_fn(model, batch):
        seen.append(batch)
        return mean_loss(model, batch["input_ids"]).expand(len(batch["input_ids"]))

    context = context.but(source=RaggedSource(ragged_batches()), loss_fn=loss_fn)
    ReferencePass.load(context.live, context.round).loss(context.live)
    for given, own in zip(seen, context.source.batches, strict=True):
        assert given.keys() == own.keys()
        assert all(torch.equal(given[key], own[key]) for key in own)


def test_the_reference_is_read_from_the_source_once():
    class Counting(RaggedSource):
        reads = 0

        def reference(self):
            self.reads += 1
            return super().reference()

    context = warm_context().but(source=Counting(ragged_batches()))
    reference = ReferencePass.load(context.live, context.round)
    assert reference.loss(context.live) == reference.loss(context.live)
    assert context.source.reads == 1
