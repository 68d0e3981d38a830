"""Recipes and plans: how a report fits its time."""

from dataclasses import replace

import pytest

from lsjax.cli.report_making import fitted_plan
from lsjax.config import ConfigError, DataConfig, LlamaConfig, Sampling
from lsjax.reporting import plan as plans
from lsjax.reporting.plan import Asked, Speeds, make_plan, read_plan, write_plan
from lsjax.reporting.recipes import SAMPLE_STEPS, chosen, recipe, with_steps, without_layerskip
from lsjax.terminal import SafeConsole

MODEL = LlamaConfig.smollm2_135m()
BASE = recipe(MODEL, "smollm2", DataConfig(), SAMPLE_STEPS)
SPEEDS = Speeds(step=2.0, plain_step=1.0, start=10.0, batch=0.3, token=0.02, compiling=5.0)


def asked(**more) -> Asked:
    own = dict(model="smollm2", task=None, training=True, minutes=30.0, seeds=1, prompts=None)
    own |= dict(new_tokens=64, exit_layers=(), num_draft_tokens=(2, 4, 8), sampling=Sampling())
    return Asked(**own | dict(base=BASE, config=BASE) | more)


def seconds(plan, strategies: int, speeds: Speeds = SPEEDS, spent: float = 0.0) -> float:
    """Time of the plan's work if all takes as long as it was measured."""
    found, given = plan.config, plan.asked
    models = given.seeds * 2
    texts = (plan.num_prompts + 1) * (1 + plans.CHEAPER * (strategies - 1) + 1) * given.seeds
    evaluations = -(-found.num_steps // found.evaluation.every)
    scored = plan.num_batches + evaluations * found.evaluation.batches
    total = spent + models * speeds.start + (strategies + 1) * given.seeds * speeds.compiling
    total += texts * given.new_tokens * speeds.token
    total += models * scored * speeds.batch
    return total + given.seeds * found.num_steps * (speeds.step + speeds.plain_step)


@pytest.mark.parametrize("minutes, seeds", [(20, 1), (30, 1), (60, 1), (60, 3), (600, 1)])
def test_a_plan_fills_its_time(minutes, seeds):
    """All but the margin for slower steps, which is 6%."""
    found = make_plan(asked(minutes=minutes, seeds=seeds), SPEEDS, strategies=11, spent=60)
    assert 0.9 < seconds(found, 11, spent=60) / (60 * minutes) <= 1
    assert found.num_prompts in plans.PROMPTS and found.num_batches in plans.BATCHES
    assert found.config.optimizer.warmup_steps == -(-found.config.num_steps // 25)


def test_slow_scoring_takes_its_time():
    """The heads of 30 exits take longer than a step: fewer batches are scored, and fewer steps."""
    slow = replace(SPEEDS, batch=9.0)
    found, usual = (make_plan(asked(), speeds, 11, spent=60) for speeds in (slow, SPEEDS))
    assert 0.9 < seconds(found, 11, slow, spent=60) / (60 * 30) <= 1
    assert found.num_batches == plans.BATCHES[0] < usual.num_batches
    assert found.config.num_steps < usual.config.num_steps


def test_too_short_a_time_is_refused_with_one_that_works():
    with pytest.raises(ConfigError, match=r"--minutes 2 is too short .* give at least (\d+)") as no:
        make_plan(asked(minutes=2.0), SPEEDS, strategies=11, spent=60)
    needed = float(str(no.value).partition("at least ")[2].partition(",")[0])
    assert make_plan(asked(minutes=needed), SPEEDS, 11, 60).config.num_steps >= plans.FEWEST_STEPS


def test_a_time_that_was_too_short_is_refused_before_the_model_is_read(tmp_path):
    """Also another one that is too short. The speeds count only for the same flags."""
    plans.write_speeds(tmp_path, asked(minutes=2.0, model="nowhere"), SPEEDS)
    given = asked(minutes=3.0, model="nowhere")
    assert plans.read_speeds(tmp_path, given) == SPEEDS
    assert plans.read_speeds(tmp_path, replace(given, seeds=2)) is None
    with pytest.raises(ConfigError, match="--minutes 3 is too short .* give at least"):
        fitted_plan(given, tmp_path, SafeConsole(), num_batches=8)


@pytest.mark.parametrize("slow", [10.0, 60.0])
def test_a_time_that_is_enough_for_more_prompts_is_enough_for_the_steps(slow):
    """The minutes that an error names work, though they also allow more prompts."""
    speeds = Speeds(step=slow, plain_step=slow / 2, start=30.0, token=0.01, compiling=1.0)
    with pytest.raises(ConfigError) as no:
        make_plan(asked(minutes=2.0), speeds, 11, 10)
    needed = float(str(no.value).partition("at least ")[2].partition(",")[0])
    assert make_plan(asked(minutes=needed), speeds, 11, 10).config.num_steps >= plans.FEWEST_STEPS


def test_frequent_evaluations_take_time():
    often = replace(BASE, evaluation=replace(BASE.evaluation, every=2))
    few, many = (make_plan(asked(config=config), SPEEDS, 11, 60) for config in (BASE, often))
    assert many.config.num_steps < 0.9 * few.config.num_steps
    assert seconds(many, 11, spent=60) < 1800


def test_given_steps_and_configurations_keep_theirs():
    given = with_steps(BASE, BASE, 500)
    assert make_plan(asked(config=given), SPEEDS, 11, 60).config.num_steps == 500
    own = asked(minutes=None, base=given, config=given)
    assert make_plan(own, SPEEDS, 11, 60).config == given


def test_without_training_all_the_time_is_for_texts():
    # (1800 - 60 - 55 - 122) / 122.1 = 12.8 prompts, and half as long ones.
    for tokens, prompts in ((64, 8), (32, 16)):
        own = asked(training=False, new_tokens=tokens)
        found = make_plan(own, Speeds(token=0.2, compiling=5.0), 11, 60)
        assert found.config == BASE and found.num_prompts == prompts
    assert make_plan(asked(training=False, prompts=3), SPEEDS, 11, 60).num_prompts == 3


def test_fields_in_steps_keep_their_share_unless_they_were_given():
    changed = replace(BASE, checkpoints=replace(BASE.checkpoints, every=50))
    found = with_steps(changed, BASE, 200)
    assert found.num_steps == 200 and found.optimizer.warmup_steps == 8
    assert found.evaluation.every == 50 and found.checkpoints.every == 50
    plain = replace(BASE, optimizer=replace(BASE.optimizer, warmup_steps=0))
    assert with_steps(plain, plain, 200).optimizer.warmup_steps == 0
    assert with_steps(changed, BASE, 30).checkpoints.every == 30
    short = with_steps(BASE, BASE, 85)
    assert short.evaluation.every == 22 and short.checkpoints.every == 17  # four, and five


def test_recipes():
    """Early exits. The control differs in layer dropout and exits only."""
    assert BASE.early_exit.exits == (2, 4, 8) and BASE.optimizer.learning_rate == 1e-3
    BASE.check_model(MODEL)
    plain = without_layerskip(BASE)
    assert plain.layer_dropout.p_max == 0 and plain.early_exit.curriculum == "none"
    names = ("layer_dropout", "early_exit")
    assert replace(plain, **{name: getattr(BASE, name) for name in names}) == BASE
    for layers in (1, 2, 3, 5):
        small = LlamaConfig.tiny(num_layers=layers)
        recipe(small, "tiny", DataConfig(), 100).check_model(small)
    wide = recipe(LlamaConfig.llama2_7b(), "llama", DataConfig(), 100)
    assert wide.optimizer.learning_rate == pytest.approx(1.41e-4, rel=0.01)
    shown = chosen(BASE)
    assert shown["early_exit.exits"] == (2, 4, 8) and "model.hidden_size" not in shown


def test_a_plan_is_kept(tmp_path):
    own = asked(exit_layers=(4,))
    assert read_plan(tmp_path, own) is None
    plan = make_plan(own, SPEEDS, 11, 60)
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path, own) == plan
    other = replace(BASE, optimizer=replace(BASE.optimizer, learning_rate=0.5))
    with pytest.raises(
        ConfigError, match=r"begun with optimizer.learning_rate 0.001, now it is 0.5"
    ):
        read_plan(tmp_path, replace(own, config=other))
