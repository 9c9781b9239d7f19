"""The table of layouts that cannot work: every row refuses its example, by name, with a way out that works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_video import layout_rules
from megatron_video.config_io import load_config
from megatron_video.device import initialize
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from megatron_video.layout import Hardware, Layout
from megatron_video.layout_rules import RULES, Rule, broken_rule, check_layout, is_valid, refusal_table, suggestions
from megatron_video.parallel import ParallelConfig, initialize_parallel
from training.config import PRESET_DIR, PretrainConfig

each_rule = pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])


def example_of(rule: Rule) -> Layout:
    return Layout().changed(rule.example)


def refusal(layout: Layout) -> str:
    with pytest.raises(UserError) as caught:
        check_layout(layout)
    return str(caught.value)


def test_names_are_unique() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)


@each_rule
def test_example_is_refused_by_its_own_rule(rule: Rule) -> None:
    assert broken_rule(example_of(rule)) is rule


@each_rule
def test_message_names_fields_values_and_a_way_out(rule: Rule) -> None:
    layout = example_of(rule)
    message = refusal(layout)
    for name in rule.fields:
        written = re.search(rf"{re.escape(name)}=(\[[^\]]*\]|[^\s,:;]+)", message)
        assert written, f"{name} is not in: {message}"
        assert yaml.safe_load(written[1]) == plain(layout[name])
    assert "nearest that work: " in message
    assert "{" not in message


def plain(value: object) -> object:
    """As YAML would read what the message says."""
    return float(".".join(map(str, value))) if isinstance(value, tuple) else value


@each_rule
def test_what_is_suggested_works(rule: Rule) -> None:
    layout, message = example_of(rule), refusal(example_of(rule))
    found = suggestions(rule, layout)
    assert found
    for change in found:
        check_layout(layout.changed(change))
        assert set(change) <= set(rule.fields)
        assert all(name in message.partition("nearest that work")[2] for name in change)


@each_rule
def test_every_rule_is_needed(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it its example passes, or is refused for a reason that says something else."""
    message = refusal(example_of(rule))
    monkeypatch.setattr(layout_rules, "RULES", tuple(other for other in RULES if other is not rule))
    left = broken_rule(example_of(rule), layout_rules.RULES)
    assert left is None or left.reason != rule.reason
    if left is not None:
        assert refusal(example_of(rule)) != message


@each_rule
def test_example_is_the_smallest(rule: Rule) -> None:
    """Every value is there for a reason: without it the rule is not broken, or another one is too."""
    for name in rule.example.keys() - {"model.rope_channel_split"}:  # follows from the channels of a head
        smaller = {key: value for key, value in rule.example.items() if key != name}
        try:
            layout = Layout().changed(smaller)
        except ValueError:  # not a model at all
            continue
        others = [other for other in RULES if other is not rule]
        assert not rule.applies(layout) or broken_rule(layout, others) is not None


def test_table_shows_every_rule_with_its_refusal() -> None:
    table = refusal_table()
    assert [rule.name for rule, _, _ in table] == [rule.name for rule in RULES]
    assert all(message == refusal(Layout().changed(example)) for _, example, message in table)


def test_layouts_that_work_are_not_refused() -> None:
    check_layout(Layout())
    check_layout(Layout(model=DiTConfig(), precision="bf16", world_size=1, micro_batches=1, hardware=Hardware()))
    cluster = Hardware(True, (9, 0), "2.11.0")
    parallel = ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        virtual_pipeline_model_parallel_size=4,
        context_parallel_size=6,
        cp_comm_type="a2a+p2p",
        hierarchical_context_parallel_sizes=[3, 2],
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        recompute_granularity="full",
        recompute_num_layers=6,
        transformer_impl="transformer_engine",
    )
    check_layout(Layout(parallel, DiTConfig(), "bf16", world_size=192, micro_batches=8, hardware=cluster))


@pytest.mark.parametrize(
    "preset",
    sorted(path.stem for path in PRESET_DIR.glob("*.yaml")),
)
def test_presets_are_not_refused(preset: str) -> None:
    config = load_config(PretrainConfig, preset, ["data.shards=[x]"], PRESET_DIR)
    replicas = config.data.micro_batches_per_step
    for count in (1, replicas):
        assert config.data_parallel_size(count * config.parallel.model_parallel_size) == count


def test_what_is_not_known_is_not_judged() -> None:
    engine = ParallelConfig(transformer_impl="transformer_engine", tensor_model_parallel_size=5)
    assert is_valid(Layout(engine))
    assert not is_valid(Layout(engine, hardware=Hardware()))
    assert not is_valid(Layout(engine, model=DiTConfig()))
    assert not is_valid(Layout(engine, world_size=2))


def test_a_way_out_that_leads_into_another_refusal_says_so() -> None:
    parallel = ParallelConfig(transformer_impl="transformer_engine", context_parallel_size=2, cp_comm_type="p2p")
    layout = Layout(parallel, hardware=Hardware())
    message = refusal(layout)
    assert "parallel.transformer_impl=local would mend this, but then parallel.cp_comm_type=p2p" in message


def test_two_fields_are_varied_where_one_is_not_enough() -> None:
    layout = Layout(ParallelConfig(pipeline_model_parallel_size=5, virtual_pipeline_model_parallel_size=5)).changed(
        {"model.num_layers": 6}
    )
    found = suggestions(next(rule for rule in RULES if rule.name == "layers over stages"), layout)
    assert found
    assert all(set(change) == {layout_rules.PP, layout_rules.VPP} for change in found)
    assert all(is_valid(layout.changed(change)) for change in found)


@pytest.mark.parametrize(("balance", "sizes"), [("auto", "8, 12, 16"), ("none", "12, 24")])
def test_suggested_batch_keeps_whole_draws(balance: str, sizes: str) -> None:
    fields = ["data.draw_size=4", "data.micro_batch_size=2", "data.global_batch_size=4", f"data.balance={balance}"]
    config = load_config(PretrainConfig, None, fields)
    with pytest.raises(UserError, match=re.escape(f"nearest that work: data.global_batch_size={sizes}")):
        config.data_parallel_size(3)


@pytest.mark.parametrize(
    ("fields", "balances"),
    [
        ({}, True),
        ({"use_distributed_optimizer": True}, True),
        ({"pipeline_model_parallel_size": 2}, True),
        ({"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}, False),
        ({"use_megatron_fsdp": True}, False),
    ],
)
def test_automatic_balance_is_by_cost_where_replicas_may_differ(fields: dict[str, Any], balances: bool) -> None:
    layout = Layout(ParallelConfig(**fields), balance="auto")
    assert layout.balances_cost == balances
    assert is_valid(layout)
    assert is_valid(layout.changed({"data.balance": "cost"})) == balances
    assert is_valid(layout.changed({"data.images_per_video": 1.0})) == balances


def test_replicas_that_do_not_divide_the_batch_work_with_balance_by_cost() -> None:
    layout = Layout(balance="auto", world_size=3, micro_batches=4)
    check_layout(layout)
    assert "equally many micro-batches; nearest that work" in refusal(layout.changed({"data.balance": "none"}))
    assert "each of 5 replicas needs a micro-batch" in refusal(layout.changed({"world_size": 5}))


def test_ring_takes_buckets_that_need_no_padding() -> None:
    ring = {"parallel.transformer_impl": "transformer_engine", "parallel.cp_comm_type": "p2p"}
    layout = Layout(model=DiTConfig(), buckets=["204x544x992"]).changed({**ring, "parallel.context_parallel_size": 2})
    check_layout(layout)  # 36 latent frames of 34 x 62: 75,888 tokens
    eight = {"parallel.tensor_model_parallel_size": 8, "parallel.sequence_parallel": True}
    assert "a multiple of 32 video tokens; 204x544x992 has 75888" in refusal(layout.changed(eight))
    check_layout(layout.changed({**eight, "parallel.cp_comm_type": "a2a"}))


SIZES = st.integers(0, 9)


@settings(max_examples=60, deadline=None)
@given(
    tensor=SIZES,
    pipeline=SIZES,
    context=SIZES,
    chunks=st.none() | SIZES,
    sequence=st.booleans(),
    kind=st.sampled_from(["a2a", "all_gather", "p2p", "a2a+p2p"]),
    heads=st.integers(1, 12),
    layers=st.integers(1, 12),
    world=st.integers(1, 16),
    batch=st.integers(1, 16),
    balance=st.sampled_from(["none", "auto", "cost"]),
)
def test_any_refusal_explains_itself_and_any_suggestion_works(
    tensor: int,
    pipeline: int,
    context: int,
    chunks: int | None,
    sequence: bool,
    kind: str,
    heads: int,
    layers: int,
    world: int,
    batch: int,
    balance: str,
) -> None:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        context_parallel_size=context,
        virtual_pipeline_model_parallel_size=chunks,
        sequence_parallel=sequence,
        cp_comm_type=kind,  # type: ignore[arg-type]
    )
    model = DiTConfig(num_attention_heads=heads, num_layers=layers)
    layout = Layout(parallel, model, world_size=world, micro_batches=batch, balance=balance, hardware=Hardware())  # type: ignore[arg-type]
    rule = broken_rule(layout)
    if rule is None:
        # Said another way than the table says it.
        assert heads % (tensor * (context if kind == "a2a" else 1)) == 0
        assert layers % (pipeline * (chunks or 1)) == 0
        replicas, left = divmod(world, tensor * pipeline * context)
        assert left == 0
        assert batch >= replicas
        # Interleaved stages go in step.
        assert batch % replicas == 0 or (balance != "none" and chunks is None)
        return
    message = refusal(layout)
    assert all(f"{name}=" in message for name in rule.fields)
    for change in suggestions(rule, layout):
        check_layout(layout.changed(change))


def pretrain(*overrides: str, world: int) -> str:
    """Output of the command as one of `world` ranks would run it: it must end before it looks for the others."""
    environment = os.environ | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    command = [sys.executable, "-m", "training.pretrain", "--config", "demo", *overrides]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_command_refuses_before_it_waits_for_other_ranks() -> None:
    """Nothing listens on the master's port: a rank that went to meet the others would not come back with this line."""
    output = pretrain("data.global_batch_size=96", "data.balance=none", world=4)
    assert output.startswith("error: data.global_batch_size=96, world_size=4, data.balance=none:")
    assert output.count("\n") == 1


def test_command_refuses_what_this_machine_does_not_have() -> None:
    if Hardware.detect().cuda:
        pytest.skip("this machine has CUDA")
    assert "parallel.transformer_impl=transformer_engine, hardware.cuda=false" in pretrain(
        "parallel.transformer_impl=transformer_engine", world=2
    )


@each_rule
def test_nothing_is_started_for_a_layout_that_is_refused(rule: Rule) -> None:
    """Neither by the configuration nor, for what it knows of it, by the process groups themselves."""
    layout = example_of(rule)
    attempts: list[Callable[[], object]] = [lambda: check_layout(layout)]
    if not is_valid(Layout(layout.parallel)):
        attempts.append(lambda: initialize_parallel(layout.parallel, 0, initialize()))
        attempts.append(lambda: PretrainConfig(parallel=layout.parallel))
    for attempt in attempts:
        with pytest.raises((UserError, ValueError)):
            attempt()
        assert not dist.is_initialized()
