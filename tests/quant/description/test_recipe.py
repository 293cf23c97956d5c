import pytest

from viditq.errors import UserError
from viditq.quant import BlockAdaRound, Gptq, LpSearch, QuantSpec, Recipe, RotateSpec, Rule, SmoothSpec

NAMES = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k", "blocks.0.ff.net.2", "blocks.1.attn1.to_q", "proj_out"]
W4 = QuantSpec(4, granularity="channel")
A8 = QuantSpec(8, granularity="token", dynamic=True)


def test_every_linear_gets_the_default():
    plan = Recipe(W4, A8).resolve(NAMES)
    assert list(plan.layers) == NAMES
    assert plan.scheme("proj_out", 0).weight == W4


def test_last_match_wins():
    w8 = QuantSpec(8, granularity="channel")
    rules = [Rule("*", weight=w8), Rule("*.attn1.*", keep_float=True), Rule("blocks.1.*", weight=W4)]
    plan = Recipe(W4, A8, rules=rules).resolve(NAMES)
    assert "blocks.0.attn1.to_q" not in plan.layers
    assert plan.scheme("blocks.0.ff.net.2", 0).weight == w8
    assert plan.scheme("blocks.1.attn1.to_q", 0).weight == W4
    assert plan.scheme("proj_out", 0).activation == A8


def test_rules_alone_quantize_what_they_name():
    plan = Recipe(rules=[Rule("proj_out", weight=W4)]).resolve(NAMES)
    assert list(plan.layers) == ["proj_out"]
    assert Recipe().resolve(NAMES).layers == {}


def test_alpha_per_segment_becomes_one_scheme_per_segment():
    smoothing = SmoothSpec([0.1, 0.2], per_segment=True)
    plan = Recipe(W4, A8, smoothing, segments=[0, 0.5, 1]).resolve(NAMES)
    assert [plan.scheme("proj_out", i).transforms[0].alpha for i in (0, 1)] == [0.1, 0.2]
    assert len(plan.schemes) == 2
    shared = Recipe(W4, A8, SmoothSpec(0.1, per_segment=True), segments=[0, 0.5, 1]).resolve(NAMES)
    assert list(shared.schemes) == ["w4a8_smooth"]


@pytest.mark.parametrize(
    "smoothing",
    [[SmoothSpec([0.1, 0.2]), RotateSpec()], {"scale": SmoothSpec([0.1, 0.2]), "rotate": RotateSpec()}],
)
def test_several_transforms_in_order(smoothing):
    rules = [Rule("proj_out", smoothing=RotateSpec(5)), Rule("*.to_k", smoothing=[])]
    plan = Recipe(W4, A8, smoothing, segments=[0, 0.5, 1], rules=rules).resolve(NAMES)
    assert plan.scheme("blocks.0.attn1.to_q", 1).transforms == (SmoothSpec(0.2), RotateSpec())
    assert plan.scheme("proj_out", 0).transforms == (RotateSpec(5),)
    assert plan.scheme("blocks.0.attn1.to_k", 0).transforms == ()
    assert list(plan.schemes) == ["w4a8_smooth_rotate", "w4a8_smooth_rotate_2", "w4a8", "w4a8_rotate"]


def test_rounding_ranges_and_rank_reach_every_scheme():
    static = QuantSpec(8)
    recipe = Recipe(W4, static, rounding=Gptq(0.02), ranges=LpSearch(2), activation_ranges="percentile", low_rank=4)
    plan = recipe.with_rules([Rule("proj_out", low_rank=2), Rule("*.to_k", low_rank=0)]).resolve(NAMES)
    scheme = plan.scheme("blocks.0.attn1.to_q", 0)
    assert (scheme.rounding, scheme.ranges, scheme.activation_ranges.name) == (Gptq(0.02), LpSearch(2), "percentile")
    assert (scheme.low_rank, plan.scheme("proj_out", 0).low_rank) == (4, 2)
    assert plan.scheme("blocks.0.attn1.to_k", 0).low_rank is None
    assert plan.moment_layers == NAMES and plan.needs_stats
    assert Recipe(W4, A8, RotateSpec()).resolve(NAMES).moment_layers == []
    assert not Recipe(W4, A8, RotateSpec()).resolve(NAMES).needs_stats


def test_rules_may_be_plain_mappings():
    assert "proj_out" not in Recipe(W4, A8, rules=[{"pattern": "proj_out", "keep_float": True}]).resolve(NAMES).layers


def test_a_pattern_that_matches_nothing_names_close_ones():
    recipe = Recipe(W4, A8, rules=[Rule("blocks.0.atn1.to_q", keep_float=True)])
    with pytest.raises(UserError, match=r"'blocks.0.atn1.to_q' matches no Linear.*close names: blocks.0.attn1.to_q"):
        recipe.resolve(NAMES)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "half", None, True, [0.1, 2.0], float("nan")])
def test_alpha_outside_the_unit_interval(alpha):
    with pytest.raises(UserError, match=r"alpha=.*number in \[0, 1\]"):
        SmoothSpec(alpha)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Recipe(W4, A8, SmoothSpec([0.1, 0.2, 0.3]), segments=[0, 0.5, 1]),
            "3 values for 2 segments",
        ),
        (lambda: Recipe(W4, A8, SmoothSpec([0.1, 0.2])), "2 values for 1 segments"),
        (lambda: Recipe(W4, A8, segments=[0, 0.5]), "must tile"),
        (lambda: Recipe(A8, A8), "a weight cannot have granularity=token"),
        (
            lambda: Recipe(W4, QuantSpec(8, granularity="token")),
            "static activation cannot have granularity=token",
        ),
        (lambda: Recipe(W4, A8, rounding="gtpq"), "unknown rounding 'gtpq'"),
        (lambda: Recipe(W4, A8, smoothing=0.5), "smoothing takes a transform"),
        (lambda: Recipe(W4, A8, [SmoothSpec(), 3]), "several of them, or null"),
        (lambda: Recipe(W4, A8, [RotateSpec(), SmoothSpec()]), "smooth must come first among the transforms"),
        (lambda: RotateSpec(-1), "seed=-1 is not possible"),
        (lambda: Recipe(4, A8), "take a QuantSpec"),
        (lambda: Recipe(smoothing=SmoothSpec()), "smoothing without quantization"),
        (lambda: Recipe(W4, A8, rules="proj_out"), "rules must be a list"),
        (lambda: Recipe(W4, A8, rules=[{"patern": "x"}]), "a rule must be a mapping with a pattern"),
        (
            lambda: Recipe(W4, A8, rules=[{"pattern": "x", "keepfloat": True}]),
            "a rule has no field 'keepfloat'",
        ),
        (
            lambda: Recipe(W4, A8, rules=[Rule("x", smoothing=SmoothSpec([0, 1, 1]))]),
            "3 values for 1 segments",
        ),
        (lambda: Rule("x"), "changes nothing"),
        (lambda: Rule("x", weight=W4, keep_float=True), "keep_float and weight"),
        (lambda: Rule(""), "a rule needs a pattern"),
        (
            lambda: SmoothSpec(aggregate="mean"),
            "aggregate='mean' is unknown; choose one of ema, max, percentile",
        ),
        (lambda: SmoothSpec(percentile=0), "percentile=0"),
        (lambda: SmoothSpec(per_segment="no"), "per_segment='no' must be true or false"),
    ],
)
def test_bad_input_is_refused_before_there_is_a_model(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": A8, "rounding": "gptq"}, "rounding=gptq changes nothing here: it is about quantized weights"),
        ({"activation": A8, "ranges": "lp"}, "ranges=lp changes nothing here: it is about quantized weights"),
        (
            {"weight": W4, "activation": A8, "activation_ranges": "lp"},
            "activation_ranges=lp .* about static activations",
        ),
        ({"weight": W4, "activation_ranges": "lp"}, "activation_ranges=lp .* about static activations"),
        (
            {"weight": W4, "activation": A8, "rounding": BlockAdaRound(learn_activation_scale=True)},
            "rounding.learn_activation_scale=true changes nothing here",
        ),
    ],
)
def test_settings_of_what_stays_in_float_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        Recipe(**settings)


def test_a_rule_alone_can_use_a_setting():
    recipe = Recipe(None, None, rounding="gptq", rules=[Rule("proj_out", weight=W4)])
    assert recipe.resolve(NAMES).moment_layers == ["proj_out"]


def test_keep_float_is_true_or_false():
    with pytest.raises(UserError, match="keep_float must be true or false, got 'yes'"):
        Rule("proj_out", keep_float="yes")
