from __future__ import annotations

import re

import pytest

from edkm_export.errors import PaletteError, RecipeError
from edkm_export.recipe import PRESETS, Recipe, Rule, load_recipe, uniform_recipe

SHAPES = {
    "model.embed_tokens": (320, 32),
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.0.mlp.down_proj": (32, 48),
    "lm_head": (320, 32),
}


def recipe(*rules: Rule) -> Recipe:
    return Recipe(name="mine", rules=rules)


def write(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


# Rules


def test_first_match_wins():
    plan = recipe(
        Rule(match="*.mlp.down_proj", bits=4, group_size=8),
        Rule(match="model.layers.*", bits=2),
        Rule(match="*", bits=8, group_size=0),
    ).plan(SHAPES, "model")
    assert {name: (rule.bits, rule.group_size) for name, rule in plan.items()} == {
        "model.embed_tokens": (8, 0),
        "model.layers.0.self_attn.q_proj": (2, 16),
        "model.layers.0.mlp.up_proj": (2, 16),
        "model.layers.0.mlp.down_proj": (4, 8),
        "lm_head": (8, 0),
    }


def test_a_later_rule_does_not_take_what_an_earlier_one_has():
    plan = recipe(Rule(match="*", bits=8), Rule(match="lm_head", bits=2)).plan(SHAPES, "model")
    assert {rule.bits for rule in plan.values()} == {8}


def test_skipped_and_unmatched_weights_stay_dense():
    plan = recipe(Rule(match="*embed*", skip=True), Rule(match="*_proj")).plan(SHAPES, "model")
    assert set(plan) == {name for name in SHAPES if name.endswith("_proj")}


def test_skip_comes_before_the_group_size():
    recipe(Rule(match="*.up_proj", skip=True, group_size=5), Rule(match="*", group_size=32)).plan(
        SHAPES, "model"
    )


def test_patterns_are_case_sensitive_shell_patterns():
    found = recipe(Rule(match="model.layers.[0-3].*.?p_proj"))
    assert found.rule_for("model.layers.0.mlp.up_proj") is not None
    assert found.rule_for("model.layers.4.mlp.up_proj") is None
    assert recipe(Rule(match="LM_HEAD")).rule_for("lm_head") is None


def test_rule_that_matches_nothing_names_itself_and_the_modules():
    message = (
        "tiny: recipe 'mine': no module matches 'layers.*'; its modules are "
        "model.embed_tokens, model.layers.0.self_attn.q_proj"
    )
    with pytest.raises(RecipeError, match=re.escape(message)):
        recipe(Rule(match="layers.*"), Rule()).plan(SHAPES, "tiny")


def test_optional_rule_may_match_nothing():
    plan = recipe(Rule(match="*experts*", optional=True), Rule()).plan(SHAPES, "tiny")
    assert plan.keys() == SHAPES.keys()


def test_group_size_that_does_not_divide_lists_usable_ones():
    message = "mlp.up_proj.weight: group_size 32 does not divide its 48 output rows; use 4, 8 or 16."
    with pytest.raises(PaletteError, match=rf"^tiny: model\.layers\.0\.{re.escape(message)}$"):
        recipe(Rule(group_size=32)).plan(SHAPES, "tiny")


@pytest.mark.parametrize("bits", [0, 5, 7, 9, -1])
def test_unsupported_bits(bits):
    with pytest.raises(
        RecipeError, match=f"no deployment target can hold {bits} bits, use one of 1, 2, 3, 4, 6, 8"
    ):
        uniform_recipe(bits)


def test_negative_group_size():
    with pytest.raises(RecipeError, match=r"group_size: .*greater than or equal to 0 \(found -4\)"):
        uniform_recipe(4, -4)


def test_rules_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        PRESETS["4bit"].rules[0].bits = 2


# Presets


@pytest.mark.parametrize("name", PRESETS)
def test_preset_carries_its_name(name):
    found = load_recipe(name)
    assert found is PRESETS[name] and found.rules
    assert name == "dense" or found.name.startswith(name)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_preset_keeps_the_outer_layers_at_8_bits(bits):
    plan = PRESETS[f"{bits}bit"].plan(SHAPES, "model")
    for name, rule in plan.items():
        outer = name in ("model.embed_tokens", "lm_head")
        assert (rule.bits, rule.group_size) == ((8, 0) if outer else (bits, 16))


def test_preset_does_without_an_output_head():
    tied = {name: shape for name, shape in SHAPES.items() if name != "lm_head"}
    assert PRESETS["4bit"].plan(tied, "model").keys() == tied.keys()


def test_dense_preset_palettizes_nothing():
    assert PRESETS["dense"].plan(SHAPES, "model") == {}


def test_per_tensor_preset():
    plan = PRESETS["4bit-per-tensor"].plan(SHAPES, "model")
    assert {rule.group_size for rule in plan.values()} == {0}


def test_uniform_recipe_passes_the_lut_dtype_on():
    assert {rule.lut_dtype for rule in uniform_recipe(3, 8, "int8").rules} == {"int8"}


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_int4_luts_are_the_linear_layers_alone(bits):
    plan = uniform_recipe(bits, 8, "int4").plan(SHAPES, "model")
    for name, rule in plan.items():
        outer = name in ("model.embed_tokens", "lm_head")
        assert (rule.bits, rule.lut_dtype) == ((8, "int8") if outer else (bits, "int4"))


@pytest.mark.parametrize("bits", [2, 3])
def test_int4_presets(bits):
    assert PRESETS[f"{bits}bit-int4"].rules == uniform_recipe(bits, 16, "int4", fit_groups=True).rules


@pytest.mark.parametrize(
    ("rows", "size"),
    [(64, 16), (24, 12), (36, 18), (20, 0), (17, 0), (100, 20), (8, 0), (2, 0), (1, 0), (1009, 1)],
)
def test_groups_that_are_fitted(rows, size):
    """The divisor nearest to 16, as a factor; 0 when that is all rows. 1009 is prime: a LUT a row is nearer."""
    rule = Rule(bits=4, group_size=16, fit_groups=True)
    assert rule.fitted(rows).group_size == size
    shapes = {"odd": (rows, 8)}
    recipe = Recipe(rules=(rule,))
    assert recipe.plan(shapes, "model")["odd"].group_size == size
    assert ("odd" in recipe.regrouped(shapes)) == (rows != 64)


def test_groups_are_fitted_only_where_they_may_be():
    assert Rule(group_size=0, fit_groups=True).fitted(7).group_size == 0
    assert Rule(group_size=16).fitted(24).group_size == 16
    with pytest.raises(PaletteError, match="group_size 16 does not divide its 24 output rows"):
        uniform_recipe(4).plan({"odd": (24, 8)}, "model")
    assert PRESETS["4bit"].plan({"odd": (24, 8)}, "model")["odd"].group_size == 12


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_int4_luts_of_many_entries_are_refused(bits):
    message = (
        f"lut_dtype: int4 has 16 levels, so that with indices of {bits} bits there is nothing left to choose; "
        "use int8, or at most 3 bits (found 'int4')."
    )
    with pytest.raises(RecipeError, match=f"^{re.escape(message)}$"):
        uniform_recipe(bits, 16, "int4")


@pytest.mark.parametrize("lut_dtype", ["float16", "int8", "int4"])
def test_a_rule_at_other_bits(lut_dtype):
    rule = Rule(match="*.q_proj", bits=2, group_size=4, lut_dtype=lut_dtype)
    assert rule.with_bits(3) == Rule(match="*.q_proj", bits=3, group_size=4, lut_dtype=lut_dtype)
    wide = "int8" if lut_dtype == "int4" else lut_dtype
    assert rule.with_bits(4) == Rule(match="*.q_proj", bits=4, group_size=4, lut_dtype=wide)


# YAML


def test_yaml(tmp_path):
    path = write(
        tmp_path / "mine.yaml",
        """
        name: mine
        rules:
          - {match: "*embed_tokens", bits: 8, group_size: 0, lut_dtype: int8}
          - {match: "lm_head", skip: true, optional: true}
          - {bits: 3}
        """,
    )
    assert load_recipe(path) == recipe(
        Rule(match="*embed_tokens", bits=8, group_size=0, lut_dtype="int8"),
        Rule(match="lm_head", skip=True, optional=True),
        Rule(match="*", bits=3, group_size=16),
    )


def test_recipe_in_a_checkpoint_reads_back():
    found = load_recipe("3bit")
    assert Recipe.model_validate(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules: [{bits: 5}]",
            "rules.0.bits: no deployment target can hold 5 bits, use one of 1, 2, 3, 4, 6, 8 (found 5)",
        ),
        ("rules: [{}, {bits: 7}]", "rules.1.bits: no deployment target can hold 7 bits"),
        ("rules: [{bits: four}]", "rules.0.bits: Input should be a valid integer"),
        ("rules: [{bit: 4}]", "rules.0.bit: Extra inputs are not permitted (found 4)"),
        ("rules: [{bits: 4}]\ngroups: 3", "groups: Extra inputs are not permitted (found 3)"),
        (
            "rules: [{group_size: -1}]",
            "rules.0.group_size: Input should be greater than or equal to 0 (found -1)",
        ),
        (
            "rules: [{lut_dtype: float32}]",
            "rules.0.lut_dtype: Input should be 'float16', 'int8' or 'int4' (found 'float32')",
        ),
        (
            "rules: [{bits: 2, lut_dtype: int4}, {lut_dtype: int4}]",
            "rules.1.lut_dtype: int4 has 16 levels, so that with indices of 4 bits",
        ),
        ("rules: [{bits: 5, lut_dtype: int4}]", "rules.0.bits: no deployment target can hold 5 bits"),
        ("rules: []", "rules: Tuple should have at least 1 item"),
        ("name: mine", "rules: Field required"),
        ("", "recipe: Input should be a valid dictionary"),
        ("- 4", "recipe: Input should be a valid dictionary"),
        ("rules: [{", "is not valid YAML"),
        ("rules: !!python/object/apply:os.getcwd []", "is not valid YAML"),
    ],
)
def test_wrong_yaml_is_explained(tmp_path, text, message):
    path = write(tmp_path / "mine.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert message in str(caught.value)


def test_several_mistakes_are_all_named(tmp_path):
    path = write(tmp_path / "mine.yaml", "rules: [{bits: 5, group_size: -1}, {skp: true}]")
    with pytest.raises(RecipeError, match=r"rules\.0\.bits.*; rules\.0\.group_size.*; rules\.1\.skp"):
        load_recipe(path)


def test_binary_file(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"rules: \xff")
    with pytest.raises(RecipeError, match="is not UTF-8 text"):
        load_recipe(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize("reference", ["5bit", "missing.yaml", "."])
def test_neither_preset_nor_file(reference):
    message = f"{reference}: no such recipe file, and no preset; presets are 8bit, 6bit, 4bit, 3bit, 2bit"
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(reference)
